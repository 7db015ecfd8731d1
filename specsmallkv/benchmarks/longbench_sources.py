"""Rows of HotpotQA and QMSum as their authors publish them, in LongBench's fields; they are known by their own fields.

HotpotQA (Yang et al., 2018): ten paragraphs, two of which hold the answer. QMSum (Zhong et al., 2021): a meeting and
what is asked about it, one row of ours a query. LongBench selects from both and takes longer contexts of HotpotQA's
articles, so these are its prompt and scorer on other rows.
"""

from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .data import Row, need

HOTPOTQA = {"question", "answer", "context", "supporting_facts"}
QMSUM = {"meeting_transcripts", "general_query_list", "specific_query_list"}


def in_longbench_fields(rows: Iterator[Row]) -> Iterator[Row]:
    """What is LongBench's already goes through as it is. Raises UserError for a broken row of the other two."""
    for where, row in rows:
        fields = set(row) if isinstance(row, dict) else set()
        if fields >= HOTPOTQA:
            yield where, hotpotqa(row, where)
        elif fields >= QMSUM:
            yield from ((where, query) for query in qmsum(row, where))
        else:
            yield where, row


def hotpotqa(row: Any, where: str) -> dict[str, Any]:
    """Paragraphs as LongBench writes them: "Passage N:", title, text. Sentences bring their own spaces."""
    question, answer, paragraphs = need(row, where, question=str, answer=str, context=list)
    if not all(is_paragraph(paragraph) for paragraph in paragraphs):
        raise UserError(f"{where} has a context that is no list of [title, sentences]; correct it there.")
    passages = [f"Passage {i}:\n{title}\n{''.join(text)}" for i, (title, text) in enumerate(paragraphs, start=1)]
    return {"context": "\n\n".join(passages), "input": question, "answers": [answer], "dataset": "hotpotqa"}


def is_paragraph(value: Any) -> bool:
    match value:
        case [str(), [*sentences]]:
            return all(isinstance(sentence, str) for sentence in sentences)
    return False


def qmsum(row: Any, where: str) -> Iterator[dict[str, Any]]:
    """General queries, then specific ones; each turn of the meeting is a line "speaker: content"."""
    lists = need(row, where, meeting_transcripts=list, general_query_list=list, specific_query_list=list)
    turns = (need(turn, f"{where}, meeting_transcripts,", speaker=str, content=str) for turn in lists[0])
    transcript = "\n".join(f"{speaker}: {content}" for speaker, content in turns)
    for query in lists[1] + lists[2]:
        asked, answer = need(query, f"{where}, its queries,", query=str, answer=str)
        yield {"context": transcript, "input": asked, "answers": [answer], "dataset": "qmsum"}
