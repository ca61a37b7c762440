"""Counting instructions in assembly, on a small one."""

import pytest
import torch

from benchmarks import cuda_code

# Before; three in a loop over points, two of them together; two in a loop over the parts of a pixel inside of an other.
ASSEMBLY = """\
        /*0000*/ MOV R1, R2 ;
.L_x_1:
        /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/ @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/ LDS.U16 R1, [R2] ;
.L_x_3:
        /*0070*/ LDS.128 R4, [R2] ;
        /*0080*/ FFMA R1, R2, R3, R4 ;
        /*0090*/ FFMA R1, R2, R3, R4 ;
        /*00a0*/ FFMA R1, R2, R3, R4 ;
        /*00b0*/ FFMA R1, R2, R3, R4 ;
        /*00c0*/ @P0 BRA `(.L_x_3) ;
        /*00d0*/ REDG.E.ADD.F32x4 [R2], R4 ;
        /*00e0*/ @P0 BRA `(.L_x_2) ;
"""


def test_loops_turn_as_often_as_the_problem_says():
    lines = ASSEMBLY.splitlines()
    assert sorted(cuda_code.loops_of(lines)) == [(1, 6), (7, 17), (9, 15)]
    share, queries = 0.25, 32
    pixels = share * 1024 / queries / 8  # of a group, for each of 8 points between two rounds
    expected = 1 + 16 * 5 + pixels * (3 + 6 / share)
    assert cuda_code.instructions_of_a_thread(ASSEMBLY, 4, share) == pytest.approx(expected)


def test_corners_on_one_pixel_of_a_tile_count_once():
    nearer, farther = (cuda_code.unique_share(noise, 64) for noise in (1, 4))
    assert 0.05 < nearer < farther < 0.5
    assert cuda_code.unique_share(1, 32) > nearer  # a smaller tile shares less


def test_tiles_cover_their_map():
    tiles = cuda_code.tiles_of(5, 17, 32)
    assert tiles.shape == (85,) and torch.bincount(tiles).max() == 32 and len(tiles.unique()) == 6


def test_blocks_of_the_encoder():
    assert cuda_code.blocks_of(64) == 8 * (21 * 13 + 11 * 7 + 6 * 4 + 3 * 2)
