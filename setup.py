"""Packaging of r2m_jax: `pip install -e .` in a clone, or `pip install -e ".[test]"` to run the
tests.

`launch/lowest.sh` tries the lower end of every range, which has wheels for Python 3.11 to 3.13. JAX
0.11 and 0.12 exist for Python 3.12 and later only; 0.10.2 is the newest for 3.11. An accelerator's
own jax (a GPU image, a TPU VM) is kept where it lies in the range.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
JAX = ">=0.8.2,<0.13"

RUN = [
  f"jax{JAX}",
  "flax>=0.12.2,<0.13",
  "optax>=0.2.5,<0.3",
  "orbax-checkpoint>=0.11.26,<0.13",
  "grain>=0.2.13,<0.3",
  "transformers>=5.15,<6",
  "jinja2>=3.1.2,<4",  # reports; transformers renders chat templates with it and does not ask for it
  "qwix>=0.1.5,<0.2",  # adapters
  "safetensors>=0.6,<1",
  "tensorflow-datasets>=4.9.10,<5",
  "importlib_resources>=6,<8",  # tensorflow-datasets imports it and does not ask for it
  "tokenizers>=0.22,<1",  # transformers brings it too
  "pyarrow>=18",  # reads parquet; tensorflow-datasets brings it
  "ml-collections>=1,<2",
  "absl-py>=1.4,<3",
  "numpy>=2.1,<3",
  "matplotlib>=3.9.2,<4",
  "tensorboardX>=2.6.2,<3",
  "tqdm>=4.66,<5",
]

NOTEBOOK = ["ipykernel>=7,<8", "nbclient>=0.10.4,<1", "nbformat>=5.10,<6"]

EXTRAS = {
  "notebook": NOTEBOOK,
  "docs": ["sphinx>=8,<10", "myst-parser>=4,<6", "sphinx-book-theme>=1.1.4,<2"],
  # torch on CPU and peft are oracles, never run-time dependencies
  "test": [
    "ruff>=0.17.6,<0.18",
    "mypy>=2.4.1,<3",
    "pytest>=9.2.0,<10",
    "pytest-xdist>=3.8.0,<4",
    "hypothesis>=6.170.15,<7",
    "torch==2.13.0",
    "peft>=0.21.2,<1",
    "uv>=0.9,<1",  # makes the environments of tests/test_colab.py
    *NOTEBOOK,
    f"jax[tpu]{JAX}",  # its compiler, which runs without a TPU
  ],
  "plan": [f"jax[tpu]{JAX}"],
  "tpu": [f"jax[tpu]{JAX}"],
  "cuda12": [f"jax[cuda12]{JAX}"],
  "cuda13": [f"jax[cuda13]{JAX}"],
}

setuptools.setup(
  name="r2m_jax",
  version=re.search(
    r'^__version__ = "(.+)"$', (ROOT / "r2m_jax/__init__.py").read_text(), re.M
  ).group(1),
  description="R2M: a reward model that reads the policy, in JAX",
  long_description=README.read_text(encoding="utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  # r2m_jax/configs is a link to configs/: a wheel holds the configs inside the package
  packages=setuptools.find_packages(include=["r2m_jax", "r2m_jax.*"]),
  entry_points={"console_scripts": ["r2m = r2m_jax.main:start"]},
  package_data={"r2m_jax.report": ["template.html"]},
  install_requires=RUN,
  extras_require=EXTRAS,
)
