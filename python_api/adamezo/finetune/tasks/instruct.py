"""Instructions: prompts and their completions, or whole conversations, in the model's own form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...integrations.sequences import target_sequence
from ..options import Options
from ..table import Table
from .generative import Generative


class Exchange(NamedTuple):
    """A conversation: (role, content) of each message. The last one is the completion."""

    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """All that comes before the completion."""
        return "\n".join(content for _, content in self.messages[:-1])

    @property
    def completion(self) -> str:
        return self.messages[-1][1]


class Instruct(Generative):
    """Completions of prompts. Their tokens alone are in the loss, unless ``--loss-on all`` adds
    those of the prompts."""

    def __init__(
        self, options: Options, model: Any, tokenizer: Any, examples: Sequence[Exchange]
    ) -> None:
        super().__init__(model, tokenizer, options.sample_tokens)
        self.examples = examples
        template = _template(options, tokenizer)
        for exchange in examples:
            prompt, whole = _texts(exchange, tokenizer, template)
            special = template is None  # a chat template writes its own special tokens
            before, ids = (
                tokenizer(text, add_special_tokens=special).input_ids for text in (prompt, whole)
            )
            if len(ids) < 2:
                raise ValueError(
                    f"{options.data}: {exchange.text!r} and its completion are one token together, "
                    "so there is nothing to predict; remove the row"
                )
            given = before if options.loss_on == "completion" else []
            tokens, cut = target_sequence(given, ids, options.max_tokens)
            self.rows.append(tokens)
            self.shortened += cut
            shown = {"text": exchange.text, "label": exchange.completion}
            self.starts.append((before[-options.max_tokens :] or ids[:1], shown))

    @classmethod
    def read(cls, options: Options, table: Table) -> list[Exchange]:
        chat = options.messages_column or "messages"
        named = options.prompt_column or options.completion_column
        if options.messages_column or (chat in table.columns and not named):
            column = table.column(chat, "messages-column")
            if not column:
                raise ValueError(f"{table.path}: no rows, expected at least two")
            return [_conversation(table.at(i), messages) for i, messages in enumerate(column)]
        prompts = table.texts(options.prompt_column or "prompt", "prompt-column")
        completions = table.texts(options.completion_column or "completion", "completion-column")
        return [
            Exchange((("user", prompt), ("assistant", completion)))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    @classmethod
    def make(
        cls, options: Options, model: Any, tokenizer: Any
    ) -> Callable[[Sequence[Exchange]], Instruct]:
        return lambda examples: cls(options, model, tokenizer, examples)


def _conversation(where: str, messages: Any) -> Exchange:
    try:
        found = tuple((m["role"], m["content"]) for m in messages)
        fine = len(found) > 1 and all(isinstance(x, str) for message in found for x in message)
    except (KeyError, TypeError):
        fine = False
    if not fine or found[-1][0] != "assistant" or not found[-1][1].strip():
        raise ValueError(
            f"{where}: got the messages {str(messages)[:120]}, expected a list of two or more, "
            "each with role and content as texts, the last of the role assistant"
        )
    return Exchange(found)


def _template(options: Options, tokenizer: Any) -> str | None:
    """The chat template that is used, or None for plain texts."""
    if options.chat_template == "none":
        return None
    if options.chat_template == "auto":
        template: str | None = getattr(tokenizer, "chat_template", None)
        return template
    path = Path(options.chat_template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"--chat-template: got {options.chat_template!r}, expected auto, none, or a file with "
            "a Jinja template"
        )
    return path.read_text(encoding="utf-8")


def _texts(exchange: Exchange, tokenizer: Any, template: str | None) -> tuple[str, str]:
    """The prompt, and the prompt with the completion, as the model sees them."""
    if template is None:
        if len(exchange.messages) > 2:
            raise ValueError(
                "conversations of more than two messages need a chat template, which the tokenizer "
                "does not have: give one with --chat-template FILE"
            )
        prompt = exchange.text
        space = "" if prompt[-1:].isspace() or exchange.completion[:1].isspace() else "\n"
        return prompt + space, prompt + space + exchange.completion + (tokenizer.eos_token or "")
    messages = [{"role": role, "content": content} for role, content in exchange.messages]
    form = {"tokenize": False, "chat_template": template}
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **form)
        whole = tokenizer.apply_chat_template(messages, **form)
    except Exception as error:  # jinja's own, and those that templates raise by themselves
        raise ValueError(
            f"the chat template refuses the conversation that begins {exchange.text[:60]!r}: "
            f"{error}; give another one with --chat-template FILE, or none"
        ) from error
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template writes a conversation in another way once the answer is known "
            f"({whole[:60]!r} after {prompt[:60]!r}), so where the completion begins is not known; "
            "give another one with --chat-template FILE, or none"
        )
    return prompt, whole
