"""Runs examples/notebook.ipynb without Jupyter, and stores its pictures and words in it.

python -m tests.examples.render runs/demo
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def read_notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(notebook: dict[str, Any], run: str) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, run in their order on another RUN."""
    import matplotlib

    # Before pyplot is imported by a cell: figures are kept, not shown.
    matplotlib.use("Agg")
    notebook = json.loads(json.dumps(notebook))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        tree = with_run(ast.parse("".join(cell["source"])), run)
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"{NOTEBOOK.name}, cell {cell['id']}", "exec"), names)
        text = printed.getvalue()
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell["outputs"] = [stream] if text else []
        cell["outputs"] += [picture_output(png) for png in figures()]
        cell["execution_count"] = number
    return notebook


def with_run(tree: ast.Module, run: str) -> ast.Module:
    """The code with RUN = `run`, where it is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN":
            node.value = ast.copy_location(ast.Constant(run), node.value)
    return tree


def figures() -> list[bytes]:
    """PNG files of the figures that are open, which are closed then."""
    import matplotlib.pyplot as plt

    files = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", dpi=72)
        # 255 colours are enough to look at, and a third of the bytes for whoever clones.
        palette = Image.open(file).convert("RGB").quantize(255)
        file = io.BytesIO()
        palette.save(file, format="png", optimize=True)
        files.append(file.getvalue())
    plt.close("all")
    return files


def picture_output(png: bytes) -> dict[str, Any]:
    data = {"image/png": base64.b64encode(png).decode() + "\n", "text/plain": ["<Figure>"]}
    return {"data": data, "metadata": {}, "output_type": "display_data"}


def pictures_of(notebook: dict[str, Any]) -> list[bytes]:
    """The PNG files that are stored in a notebook."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "data" in o]


def main(run: str) -> None:
    notebook = executed(read_notebook(), run)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{NOTEBOOK}: {len(pictures_of(notebook))} pictures")


if __name__ == "__main__":
    main(sys.argv[1])
