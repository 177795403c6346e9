"""Write the resolved recipes beside this file: python tests/golden/write.py"""

from __future__ import annotations

from pathlib import Path

from whimbrel.config import to_toml
from whimbrel.recipes import RECIPES

for name, make in RECIPES.items():
    (Path(__file__).parent / f"{name}.toml").write_text(to_toml(make()), encoding="utf-8")
