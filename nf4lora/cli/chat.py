"""From an instruction or a chat to the text a model reads, and where in it the answers are."""

import re
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from .rows import Row
from .settings import UserError

# The prompts of Stanford's Alpaca, for tokenizers without a chat template
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
MORE, INPUT = ", paired with an input that provides further context", "### Input:\n{}\n\n"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
THOUGHTS = re.compile(r"<think>\s*$")
PARTS = re.compile(r"""['"]text['"]""")
ADVICE = "give --loss-on all, or a chat template with {% generation %} marks"


class Example(NamedTuple):
    """A text and its answers."""

    text: str
    answers: list[tuple[int, int]]  # from character, up to character: each with what ends it
    left_out: int = 0  # answers that cannot be told from the rest
    # By the template itself; a token that reaches into an answer is then part of it, as transformers has it
    marked: bool = False


class Reader:
    """Makes examples of the rows that are no documents.

    Args:
        tokenizer: of transformers
        find: tell where the answers are; else all of a text counts as one
    """

    def __init__(self, tokenizer: Any, find: bool) -> None:
        self._tokenizer, self._find = tokenizer, find
        self._eos = tokenizer.eos_token or ""
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._ends = tuple({*tokenizer.all_special_tokens, *added})
        self._bos = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else ""

    def example(self, row: Row) -> Example:
        """An answer at the end of the text is followed by the end-of-text token, unless a special token or a mark ends it.

        Raises: UserError: a chat without a template, messages that it refuses, no answer, or none that can be told.
        """
        if not self._tokenizer.chat_template:
            return self._alpaca(row)
        messages = row.messages or _as_chat(*row.instruction)
        count = sum(message["role"] == "assistant" for message in messages)
        if self._find and not count:
            raise UserError(
                f'{row.where} has no message of the role "assistant" to learn from; add one, or give --loss-on all'
            )
        try:
            if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts:
                messages = [message | _joined(message.get("content")) for message in messages]
            text, answers, marked = self._rendered(messages, row.tools)
            text.encode()
        except Exception as error:  # whatever a template written by others raises
            raise UserError(f"{row.where}: the chat template refuses its messages ({error!s:.200})") from error
        if not answers:
            raise UserError(f"{row.where}: the chat template does not let its answers be told from the rest; {ADVICE}")
        begin, end = answers[-1]
        if not marked and end == len(text) and not text.rstrip().endswith(self._ends):
            text += self._eos
            answers = [*answers[:-1], (begin, len(text))]
        return Example(text, answers, max(count - len(answers), 0) if self._find else 0, marked)

    def _alpaca(self, row: Row) -> Example:
        """With the token that begins a text, where the tokenizer gives one to every text."""
        if row.instruction is None:
            raise UserError(f'{row.where} has "messages", but the tokenizer has no chat template; wanted "text"')
        task, more, answer = row.instruction
        given = INPUT.format(more) if more.strip() else ""
        prompt = self._bos + ALPACA.format(more=MORE if given else "", instruction=task, input=given)
        text = prompt + answer + self._eos
        return Example(text, [(len(prompt) if self._find else 0, len(text))])

    def _rendered(self, messages: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]], bool]:
        template = self._tokenizer.get_chat_template(tools=tools)
        if self._find and MARKS.search(template):
            from transformers.utils.chat_template_utils import render_jinja_template

            special = self._tokenizer.special_tokens_map
            texts, answers = render_jinja_template(
                [messages], tools, chat_template=template, return_assistant_tokens_mask=True, **special
            )
            return texts[0], answers[0], True
        text = self._render(messages, tools)
        return text, self._told(messages, tools, text) if self._find else [(0, len(text))], False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the text of a list of parts; one for strings alone writes Python's form of the list."""
        parts = [{"type": "text", "text": text} for text in ("part-1", "part-2")]
        try:
            text = self._render([{"role": "user", "content": parts}], None)
        except REFUSALS:
            return False
        return "part-1" in text and "part-2" in text and not PARTS.search(text)

    def _render(self, messages: list[dict], tools: Any, prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    def _told(self, messages: list[dict], tools: Any, text: str) -> list[tuple[int, int]]:
        """Answers between two renderings: up to its prompt, and up to itself. The text must begin with both.

        A prompt may open thoughts that the answer lacks, and a chat end with one more token than its turns do. Left out are
        answers where that does not explain it (templates that strip the thoughts of all but the last), and a first message,
        which has no prompt.
        """
        found = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._render(messages[:i], tools, prompt=True)
                until = text if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
            except REFUSALS:  # the template takes the whole only, or no empty chat
                continue
            if not until.startswith(before):
                before = THOUGHTS.sub("", before)
            turn = until.removesuffix(self._eos)
            if not text.startswith(until) and turn.rstrip().endswith(self._ends):
                until = turn
            if text.startswith(until) and until.startswith(before):
                found.append((len(before), len(until)))
        return found


def _joined(content: Any) -> dict[str, str]:
    return {"content": "".join(part["text"] for part in content)} if isinstance(content, list) else {}


def _as_chat(task: str, more: str, answer: str) -> list[dict[str, Any]]:
    user = f"{task}\n\n{more}" if more.strip() else task
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
