"""What pyproject.toml cannot say beside finding packages: recipes/ is installed as a folder of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sleepify", "sleepify.*"]), "sleepify.recipes"],
    package_dir={"sleepify.recipes": "recipes"},
    package_data={
        "sleepify": ["py.typed"],
        "sleepify.recipes": ["configs/*.yaml", "configs/*.jsonl", "accelerate/*.yaml", "accelerate/*.sh"],
    },
)
