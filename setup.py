"""The distribution `tenfold`: the packages framework, ops and data_tools.

    pip install torch                                    # first: the build that suits your machine
    DS_BUILD_OPS=0 pip install --no-build-isolation -e '.[dev]'

Without isolation, so that pip builds against the torch that is installed instead of fetching another one.
"""

from setuptools import find_packages, setup

PACKAGES = ["framework", "ops", "data_tools"]

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
    "numpy",
    "tqdm",
]

EXTRAS = {
    "dev": ["pytest", "hypothesis", "ruff", "mypy", "clang-format", "faster-coco-eval"],
    # The same COCO numbers as pycocotools, about 9 times faster.
    "fast": ["faster-coco-eval"],
    # NVIDIA's apex, from its repository: the "apex" of PyPI is another project. Its kernels, which are all
    # that is of use here, need a CUDA toolkit and are built only when asked for:
    #   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation -e '.[apex]'
    "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
}

setup(
    name="tenfold",
    version="0.1.0",
    description="Training of Deformable DETR and DETR: DeepSpeed, WebDataset, runs that resume, COCO AP",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}{rest}" for name in PACKAGES for rest in ("", ".*")]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
