# SPDX-License-Identifier: Apache-2.0
"""Prints docs/settings.md: every setting with its type, default and meaning.

python scripts/settings_table.py > docs/settings.md
python scripts/settings_table.py --check
"""

import sys
from pathlib import Path

from jaxllm.config.fields import section_names, settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def markdown() -> str:
    """Returns the page, a table for each section of the config."""
    lines = [
        "# Settings",
        "",
        "Made from `jaxllm/config/sections.py` and `jaxllm/config/model.py` by",
        "`scripts/settings_table.py`. A config file sets them; on the command line,",
        "`--config.optimizer.lr=3e-4` overrides it.",
    ]
    for section, name in section_names().items():
        lines += ["", f"## {name}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for setting in settings():
            owner, _, field = setting.name.rpartition(".")
            if owner == name:
                kind = setting.type.replace("|", "\\|")
                default = f"`{setting.default}`" if setting.default else "required"
                doc = setting.doc.replace("|", "\\|")
                lines.append(f"| `{field}` | `{kind}` | {default} | {doc} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Prints the page, or with --check says whether docs/settings.md is that page."""
    if arguments != ["--check"]:
        print(markdown(), end="")
        return 0
    if PAGE.read_text() == markdown():
        return 0
    print(f"{PAGE.name} is not current: scripts/settings_table.py > docs/settings.md")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
