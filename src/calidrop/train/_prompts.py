"""What a model is asked in training: passages of a text with an instruction, and questions one per line of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calidrop.parts import check_int
from calidrop.train._text import read_rows

INSTRUCTIONS = (
    "Summarize this passage in two sentences.",
    "Write a short summary of the text above.",
    "What happens in this passage?",
    "Who are the people in this passage, and what does each of them want?",
    "List three facts that the text states.",
    "What is the mood of this passage? Quote the words that show it.",
    "Continue the story.",
    "Where does this take place? Quote the sentence that tells.",
    "Explain the passage to a child.",
    "Write a title for this passage and say why it fits.",
    "Rewrite the first sentence in modern English.",
    "Rewrite the last sentence in modern English.",
    "Which sentence is the most important one? Quote it and explain.",
    "Ask three questions about this text, and answer them.",
    "What does the speaker feel, and how can one tell?",
    "Copy the sentence in the middle of the passage that has the most detail.",
    "Which objects are mentioned? Make a list.",
    "Describe the relation between the people in the text.",
    "What might happen next, and why?",
    "Turn this passage into a short dialogue.",
)


def read_questions(file: Path | None) -> list[str]:
    """The "question" of every line of a JSONL file."""
    rows = [] if file is None else read_rows(file.read_text("utf-8"), str(file), "question")
    return [row["question"] for row in rows]


def prompts(
    tokenizer: Any, text: str, questions: Sequence[str], n: int, shortest: int, longest: int, seed: int = 0
) -> list[list[int]]:
    """n chats that end where the answer begins, of `shortest` to `longest` tokens besides the template's; a quarter of
    them lists of questions, one of which is to be answered, if there are any."""
    check_int("samples", n, 1)
    check_int("shortest", shortest, 8)
    check_int("longest", longest, shortest)
    draw, ids = random.Random(seed), tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < longest:
        raise ValueError(f"text too short: got {len(ids)} tokens, need {longest}")
    made = []
    for i in range(n):
        length = round(shortest * (longest / shortest) ** draw.random())
        if questions and i % 4 == 3:
            made.append(chat(tokenizer, _exam(tokenizer, questions, length, draw)))
            continue
        start = draw.randrange(len(ids) - length + 1)
        passage, ask = tokenizer.decode(ids[start : start + length]).strip(), draw.choice(INSTRUCTIONS)
        first = draw.random() < 0.2
        made.append(chat(tokenizer, f"{ask}\n\n{passage}" if first else f"{passage}\n\n{ask}"))
    return made


def _exam(tokenizer: Any, questions: Sequence[str], length: int, draw: random.Random) -> str:
    """As many questions as fit, and one of them asked; where only one fits, that one alone."""

    def size(question: str) -> int:
        return len(tokenizer(question)["input_ids"]) + 4

    picked = [draw.choice(questions)]
    while sum(map(size, picked)) + size(more := draw.choice(questions)) <= length:
        picked.append(more)
    if len(picked) == 1:
        return picked[0]
    at = draw.randrange(len(picked))
    listed = "\n\n".join(f"Problem {i + 1}: {q}" for i, q in enumerate(picked))
    return f"{listed}\n\nSolve problem {at + 1} step by step."


def chat(tokenizer: Any, message: str) -> list[int]:
    """The message as the model's chat template has it, up to where the answer begins; as it is where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer(message + "\n\n")["input_ids"]
    turn = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
