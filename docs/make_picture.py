"""Regenerates docs/puna.svg, the README's picture: real commands and their real output.

python docs/make_picture.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = [
    ["run", "smollm2", "Why is the sky blue? Answer in one sentence.", "--temperature", "0"],
    ["run", "smollm2", "Invent a person.", "--temperature", "0", "--format", '{"type":"object","properties":'
     '{"name":{"type":"string"},"age":{"type":"integer"}},"required":["name","age"],"additionalProperties":false}'],
    ["bench", "smollm2", "--prompt-tokens", "512", "--gen-tokens", "128"],
]  # fmt: skip


def main() -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=110, file=nowhere)
        for arguments in COMMANDS:
            shown = " ".join(f"'{a}'" if " " in a or "{" in a else a for a in arguments)
            console.print(Text.assemble(("$ ", "bold green"), (f"puna {shown}", "bold")))
            command = [sys.executable, "-m", "puna", *arguments]
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
            console.print(Text(result.stdout.rstrip() + "\n"))
        picture = console.export_svg(title="puna")
    # The viewer's own monospace font serves; a picture should fetch nothing.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S)
    Path(__file__).with_name("puna.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
