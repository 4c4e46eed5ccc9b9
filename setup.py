"""Package metadata; the settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "demo": ["scikit-learn>=1.3", "matplotlib>=3.7"],
    "eval": ["matplotlib>=3.7", "transformers>=4.40"],
    "plots": ["matplotlib>=3.7"],
    "tensorboard": ["tensorboard>=2.14"],
    "safetensors": ["safetensors>=0.4"],
    "diffusers": ["diffusers>=0.30", "safetensors>=0.4"],
    "lmdb": ["lmdb>=1.4"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    # For models/kernels/norm_triton.py on a GPU; torch for NVIDIA GPUs brings its own. Several hundred MB, so not among the tests' needs.
    "triton": ["triton>=3.7; platform_system == 'Linux'"],
    # An MPI library as a wheel, for machines without one of their own; mpi4py finds it by itself.
    "mpi": ["mpich>=4.2"],
}
EXTRAS["test"] = [
    *EXTRAS["demo"],
    *EXTRAS["tensorboard"],
    *EXTRAS["diffusers"],
    *EXTRAS["lmdb"],
    *EXTRAS["onnx"],
    *EXTRAS["mpi"],
    "hypothesis>=6.100",
    "mypy==2.4.1",
    "pytest>=8.0",
    "pytest-rerunfailures>=15.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "ruff==0.17.6",
    "scipy>=1.11",
    "build>=1.2",
]

setup(
    name="guided-diffusion",
    version="1.0.0",
    description="Train, guide, sample and score image diffusion models (Dhariwal & Nichol, 2021), rebuilt for today",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*", "evaluations", "evaluations.*"]),
    package_data={"guided_diffusion": ["py.typed"]},
    install_requires=[
        "torch>=2.7",
        "numpy>=1.24",
        "blobfile>=2.1",
        "mpi4py>=3.1",
        "tqdm>=4.60",
        "pillow>=9.4",
        "filelock>=3.12",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "guided-diffusion=guided_diffusion.cli.main:main",
            "guided-diffusion-evaluate=evaluations.evaluator:main",
        ]
    },
)
