"""The report's part on attention: what the policy says, and the pictures that passes drew."""

import base64
from html import escape
from pathlib import Path

from compressor.attention.policy import describe, read_policy

FOLDER = "plots"
"""Where a run puts its pictures, beside the weights and outside the manifest."""


def attention(folder: Path) -> str:
    """HTML for a finished checkpoint's folder; empty where it has neither policy nor pictures.

    Pictures are part of the page, which stands alone.
    """
    policy = read_policy(folder)
    said = [] if policy is None else [f"<p>{escape(line)}</p>" for line in describe(policy)]
    drawn = []
    for path in sorted((folder / FOLDER).glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        name = escape(path.stem.replace("_", " "))
        drawn.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}" '
            f'style="max-width:100%"><figcaption class="quiet">{name}</figcaption></figure>'
        )
    return "\n".join([*said, *drawn])
