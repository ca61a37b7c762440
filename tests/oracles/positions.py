"""Position codes, and the boxes that tokens propose, in loops over plain floats."""

import math


def box_code(box, width):
    """Four codes of `width` numbers, one for each number of the box."""
    return [x for number in box for x in _waves(2 * math.pi * number, width)]


def pixel_code(row, column, unpadded_hw, width, offset):
    """Half the numbers code y, the other half x."""
    y, x = (row + 1 + offset) / unpadded_hw[0], (column + 1 + offset) / unpadded_hw[1]
    return _waves(2 * math.pi * y, width // 2) + _waves(2 * math.pi * x, width // 2)


def proposals(sizes_hw, unpadded_hw):
    """For each token of an image, level after level: the box it starts from, and whether it may propose."""
    tokens = []
    for level, ((height, width), (rows, columns)) in enumerate(zip(sizes_hw, unpadded_hw, strict=True)):
        side = 0.05 * 2**level
        for row in range(height):
            for column in range(width):
                box = [(column + 0.5) / columns, (row + 0.5) / rows, side, side]
                away_from_the_border = all(0.01 < x < 0.99 for x in box)
                tokens.append((box, row < rows and column < columns and away_from_the_border))
    return tokens


def _waves(angle, width):
    code = []
    for pair in range(width // 2):
        phase = angle / 10000 ** (2 * pair / width)
        code += [math.sin(phase), math.cos(phase)]
    return code
