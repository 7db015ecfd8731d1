"""From a prompt or a conversation to the text that is tokenised, by the tokenizer's own chat template."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .prompts import Messages


def render(
    tokenizer: PreTrainedTokenizerBase, origin: str, prompt: str | Messages, chat: bool | None = None
) -> tuple[str, bool]:
    """The text, and whether the tokenizer adds its special tokens to it. origin: what the target is called.

    chat: None takes the template if there is one. Raises UserError where one is needed and missing, or refuses.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not has_template and (chat or not isinstance(prompt, str)):
        raise UserError(f"The target ({origin}) has no chat template; give a plain prompt and chat=false.")
    if isinstance(prompt, str) and (not has_template or chat is False):
        return prompt, True
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
    except TemplateError as error:  # many templates refuse a role, or an order of roles
        raise UserError(f"The chat template refuses the messages ({error}); correct their roles.") from error
