"""How the package reads, in figures: `python -m benchmarks.structure`.

Characters of a line and their share above 100, comment lines, parameters, nested functions, and
questions about types, over relay_jax/ (blank lines are not counted).
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "relay_jax"
KINDS = ("EdmProcess", "RelayProcess", "Heun")  # processes and samplers


def parameters(function: ast.FunctionDef) -> int:
    """Of a function, without self and cls."""
    arguments = function.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in names)


def figures() -> dict[str, str]:
    """By what they count."""
    files = sorted(PACKAGE.rglob("*.py"))
    texts = {file: file.read_text() for file in files}
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    comments = [line for line in lines if line.lstrip().startswith("#")]
    nodes = {file: list(ast.walk(ast.parse(text))) for file, text in texts.items()}
    functions = [n for all_ in nodes.values() for n in all_ if isinstance(n, ast.FunctionDef)]
    nested = sum(
        isinstance(inner, ast.FunctionDef) and inner is not function
        for function in functions
        for inner in ast.walk(function)
    )
    asking = sum(
        isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "isinstance"
        and any(kind in ast.unparse(node.args[1]) for kind in KINDS)
        for all_ in nodes.values()
        for node in all_
    )
    naming = [
        file
        for file, text in texts.items()
        if "UNet" in text and file.relative_to(PACKAGE).parts[0] not in ("models", "official")
    ]
    longest = max(files, key=lambda file: len(texts[file].splitlines()))
    return {
        "files": f"{len(files)}",
        "lines that are not blank": f"{len(lines)}",
        "mean characters of a line": f"{sum(map(len, lines)) / len(lines):.1f}",
        "lines above 100 characters": f"{sum(len(line) > 100 for line in lines)}",
        "comments for 100 other lines": f"{100 * len(comments) / (len(lines) - len(comments)):.1f}",
        "most parameters of a function": f"{max(map(parameters, functions))}",
        "nested functions": f"{nested}",
        "isinstance on processes and samplers": f"{asking}",
        "files naming UNet outside models/ and official/": f"{len(naming)}",
        "longest file": f"{longest.relative_to(PACKAGE)}, {len(texts[longest].splitlines())} lines",
    }


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name:50}{value}")
