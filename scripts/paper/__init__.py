"""The paper, figure by figure (arXiv 2401.01008), each in a module of its own.

A module of a figure has a `TITLE` and five functions:

- `measure(study)`: what is found on a model, as plain data for JSON;
- `draw(found, path)`: the plot, in the paper's axes;
- `verdict(found)`: whether the paper's statement holds there, and the sentence that says why;
- `ours(found)`: the numbers that were found, as Markdown;
- `papers()`: what the paper measured and how, and its numbers, from numbers.json.

`python scripts/reproduce.py` runs them.
"""
