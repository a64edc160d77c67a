"""A conversation as LLaVA's JSON writes it."""

from __future__ import annotations


def conversation(question, answer):
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
