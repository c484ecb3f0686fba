"""Chat templates: a conversation becomes one text, and where in it the assistant speaks.

A model's template is code from a stranger: it runs in jinja2's immutable sandbox, in a process of its own with limits
on time and memory, and whatever goes wrong in it is a `UserError` naming its file.
"""

from entrenar_gpu.chat.sandbox import MARKS, Message, Span
from entrenar_gpu.chat.template import ChatTemplate, Conversation, FailedRow
from entrenar_gpu.chat.turns import Rendered

__all__ = [
    "MARKS",
    "ChatTemplate",
    "Conversation",
    "FailedRow",
    "Message",
    "Rendered",
    "Span",
]
