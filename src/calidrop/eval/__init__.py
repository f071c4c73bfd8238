"""`calidrop eval`: tasks, measured under many recipes, as rows of one JSON-lines file.

What is imported here and in `sample`, `score`, `rows`, `table` and `jsonl` needs nothing but Python, so that other
libraries can be measured by the same code in an environment of their own.
"""
