"""Chat messages to token ids, through the model's own chat template.

Templates come with models, so they run in transformers' sandbox (jinja2, immutable, no torch).
Special tokens written inside message text stay plain text: only the template can make them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from headstart.engine.errors import ModelError, RequestError
from headstart.engine.segments import Turn
from headstart.server.tokenizer import Tokenizer

Message = dict[str, str]


class ChatTemplate:
    """A model's chat template; raises ModelError when it cannot be compiled."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ModelError("the model has no chat template")
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        try:
            self._render([{"role": "user", "content": ""}])
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is broken: {error}") from error
        except Exception:
            pass  # a template may refuse this chat and serve others

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat, up to where the assistant's answer begins.

        Raises RequestError with the template's own words when it refuses the messages.
        """
        texts = [text for message in messages for text in message.values()]
        hidden = self._tokenizer.placeholders(texts)
        if hidden:
            messages = [
                {key: self._tokenizer.hide_control(text, hidden) for key, text in message.items()}
                for message in messages
            ]
        try:
            rendered = self._render(messages)
        except jinja2.TemplateError as error:
            reason = str(error)
        except Exception as error:  # whatever a template may do with a chat it does not expect
            reason = f"{type(error).__name__}: {error}"
        else:
            return self._tokenizer.encode_rendered(rendered, hidden)
        raise RequestError(f"the model's chat template refuses the messages: {reason}", "messages")

    def encode_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[Turn]]:
        """Stub, right for templates whose messages do not depend on each other."""
        token_ids = self.encode(messages)
        answer = len(self.encode([]))
        ends = [len(self.encode(messages[: i + 1])) - answer for i in range(len(messages))]
        starts = [0, *ends[:-1]]
        roles = [message["role"] for message in messages]
        return token_ids, [Turn(*turn) for turn in zip(roles, starts, ends, strict=True)]

    def _render(self, messages: Sequence[Message]) -> str:
        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self._template,
            add_generation_prompt=True,
            **self._tokenizer.special_tokens,
        )
        return rendered[0]  # type: ignore[no-any-return]
