"""The distribution `tenfold`: the packages framework, ops and data_tools, and the library ops/_C.abi3.so.

    pip install torch                                    # first: the build that suits your machine
    DS_BUILD_OPS=0 pip install --no-build-isolation -e '.[dev]'

Without isolation, so that pip builds against the torch that is installed instead of fetching another one.

    python setup.py build_ext --inplace                  # the library alone; `make build` does it when needed

needs a C++17 compiler, g++ or what CXX names. Where nvcc is on the PATH, or in bin/ of CUDA_HOME, CUDA kernels are
compiled for TENFOLD_CUDA_ARCHS: "80 90" unless set, with PTX of the last; "native" for the GPUs of this machine,
"none" for none.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PACKAGES = ["framework", "ops", "data_tools"]
CSRC = Path("ops", "csrc")
# What ptxas said of every CUDA kernel when the library was built: registers, bytes spilled. A test reads it.
REPORT = Path("build", "ptxas.txt")

REQUIRES = [
    "torch>=2.10",
    "deepspeed==0.19.8",  # pinned: the portable checkpoint reads private parts of ZeRO
    "webdataset",
    "pycocotools",
    "omegaconf>=2.4",  # the first that reads Literal fields
    "pyyaml",
    "tensorboard",
    "scipy",
    "safetensors",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "matplotlib",
    "numpy",
    "tqdm",
]

EXTRAS = {
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "clang-format",
        "hotcoco",
        "isal",
        "boto3",
        "moto[server]",
    ],
    # The same numbers, faster: COCO's as pycocotools gives them (docs/speed.md), checksums as zlib (4 times).
    "fast": ["hotcoco", "isal"],
    # Shard sets behind s3:// URLs.
    "s3": ["boto3"],
    # NVIDIA's apex, from its repository: the "apex" of PyPI is another project. Its kernels, which are all
    # that is of use here, need a CUDA toolkit and are built only when asked for:
    #   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation -e '.[apex]'
    "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
}

# The instruction sets of the CPU kernels; which one runs is decided at run time.
PORTABLE = {"portable": []}
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
TARGET = "x86_64-linux" if platform.machine() in ("x86_64", "AMD64") else "sbsa-linux"  # as CUDA's toolkit names it
# -Wno-psabi: vectors are passed to inlined functions only.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


class BuildLibrary(build_ext):
    """Compile ops/csrc with the compiler itself: torch's helpers bring what the stable ABI does without."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp, "ops")
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        cxx = compiler()
        REPORT.unlink(missing_ok=True)
        built = compile_all({objects / f"{name}.o": command for name, command in compilations(cxx).items()})
        run([*cxx, "-shared", *built, *torch_libraries(), *cuda_runtime(), "-o", str(library)])
        cuda = f"CUDA kernels for {' '.join(cuda_archs())}" if cuda_archs() else "no CUDA kernels: no nvcc is used"
        print(f"built {library.name}: CPU kernels for {', '.join(isas())}; {cuda}")


class Sanitize(Command):
    """Run the CPU kernels once under AddressSanitizer and UBSan."""

    description = "run the CPU kernels under AddressSanitizer and UBSan"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        folder = Path("build", "sanitize")
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
        commands = {n: c for n, c in compilations(compiler()).items() if n not in ("bindings", "cuda")}
        commands["sanitize"] = [*compiler(), *CXX_FLAGS, "-c", "tests/ops/sanitize.cpp"]
        objects = compile_all({folder / f"{name}.o": [*command, *flags] for name, command in commands.items()})
        run([*compiler(), *flags, *objects, "-o", str(folder / "sanitize")])
        print(subprocess.run([folder / "sanitize"], check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


def compile_all(commands: dict[Path, list[str]]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, ([*command, "-o", str(path)] for path, command in commands.items())))
    return [str(path) for path in commands]


def compilations(cxx: list[str]) -> dict[str, list[str]]:
    """Name of an object: the command that compiles it."""
    base = [*cxx, *CXX_FLAGS, "-c"]
    kernels = {name: [*base, *flags, str(CSRC / "cpu" / f"{name}.cpp")] for name, flags in isas().items()}
    define = [f'-DTENFOLD_CUDA_ARCHS="{" ".join(cuda_archs())}"'] if cuda_archs() else []
    return (kernels if not cuda_archs() else kernels | {"cuda": nvcc_command()}) | {
        "kernels_of": [*base, str(CSRC / "cpu" / "kernels_of.cpp")],
        "bindings": [*base, *torch_headers(), *define, str(CSRC / "bindings.cpp")],
    }


def isas() -> dict[str, list[str]]:
    return PORTABLE | (X86 if platform.machine() in ("x86_64", "AMD64") else {})


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def cuda_archs() -> list[str]:
    """Compute capabilities without the point; none where there is no nvcc."""
    archs = os.environ.get("TENFOLD_CUDA_ARCHS", "80 90").replace(";", " ").replace(",", " ").split()
    if archs == ["none"] or not nvcc():
        return []
    if archs == ["native"]:
        return gpus()
    if not archs or not all(re.fullmatch(r"[0-9]{2,3}[a-z]?", arch) for arch in archs):
        sys.exit(f"error: TENFOLD_CUDA_ARCHS: {' '.join(archs)!r}, expected numbers like 80 90, native or none")
    return archs


def gpus() -> list[str]:
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


def nvcc_command() -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()]
    newer = f"-gencode=arch=compute_{cuda_archs()[-1]},code=compute_{cuda_archs()[-1]}"
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes, newer]
    return [str(nvcc()), *flags, "-c", str(CSRC / "cuda" / "kernels.cu")]


def cuda_runtime() -> list[str]:
    if not cuda_archs():
        return []
    home = Path(str(nvcc())).resolve().parent.parent
    folders = [Path(os.environ.get("CUDA_HOME", home)), home, Path("/usr/local/cuda")]
    folders = [folder / lib for folder in folders for lib in ("lib64", "lib", f"targets/{TARGET}/lib")]
    found = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
    if not found:
        sys.exit(f"error: no libcudart_static.a beside {nvcc()}; set CUDA_HOME, or TENFOLD_CUDA_ARCHS=none")
    return [f"-L{found[0]}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(command[0]):
        sys.exit(f"error: no C++ compiler {command[0]}, which ops/_C.abi3.so needs; on Debian: apt-get install g++")
    return command


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        sys.exit(f"error: install torch first, then tenfold with --no-build-isolation ({error})")
    return Path(torch.__file__).parent


def torch_headers() -> list[str]:
    # The interface of torch 2.10, which later ones keep.
    return [f"-isystem{torch_folder() / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def torch_libraries() -> list[str]:
    # Whoever loads the library has these loaded already: it needs no path to them.
    # --no-as-needed: libtorch brings the CUDA half, where there is one, for the symbols that are weak.
    return [f"-L{torch_folder() / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def run(command: list[str]) -> None:
    """Prints what the command says; what ptxas says of kernels goes to REPORT."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = result.stdout.splitlines(keepends=True)
    said = [line for line in lines if re.match(r"ptxas info|    \d+ bytes stack frame", line)]
    if said:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("".join(said))
    rest = "".join(line for line in lines if line not in said)
    if result.returncode or rest:
        print(f"$ {shlex.join(command)}\n{rest}", file=sys.stderr)
    if result.returncode:
        sys.exit(f"error: exit code {result.returncode} of the command above")


setup(
    name="tenfold",
    version="0.1.0",
    description="Training of Deformable DETR and DETR: DeepSpeed, WebDataset, runs that resume, COCO AP",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    ext_modules=[Extension("ops._C", sources=[], py_limited_api=True)],
    # One wheel for every Python from 3.11 on: the library has nothing of Python's in it.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    cmdclass={"build_ext": BuildLibrary, "sanitize": Sanitize},
)
