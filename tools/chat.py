"""Conversations as documents: what a tokenizer's chat template makes of them, and which tokens are the assistant's answers.

An answer is what the model itself would generate at its place: it begins where the template ends that renders the messages before
it with the prompt for an answer, and ends behind the end-of-turn token. So the template is asked, never parsed; it may have
{% generation %} marks or none. Where it renders an answer differently once the conversation goes on (Qwen3 drops the thinking of
earlier turns) the conversation becomes several documents, one for each such answer, with everything before it as a later turn
shows it: each answer is learned once, in the context in which it would be generated.
"""
import json

import numpy

from user_error import UserError

ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "tool": "tool"}
KEYS = ("messages", "conversations", "tools")


class Template:
    """The chat template of the tokenizer in `folder`, or the one in `file`. `arguments`: what else it is given."""

    def __init__(self, folder, file=None, arguments=None):
        from transformers import PreTrainedTokenizerFast  # tokenizer.json as it is, whatever class its configuration names
        self.name = str(file or folder)
        self.arguments = arguments or {}
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if file:
            self.tokenizer.chat_template = file.read_text()
        if not self.tokenizer.chat_template:
            raise UserError(f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); give "
                            "one by --template FILE")
        self.text = json.dumps(self.tokenizer.chat_template)
        special = self.tokenizer.added_tokens_decoder.values()
        self.special = sorted((token.content for token in special if token.special), key=len, reverse=True)

    def render(self, messages, tools, where, prompt=False, **arguments):
        from jinja2 import TemplateError
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt,
                                                      **arguments, **self.arguments)
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise UserError(f"{where}: the chat template of {self.name} refuses the first {len(messages)} messages: {error}") from None

    def documents(self, row, where, parse_special=False):
        """[(text, [(begin, end) of each answer in it])] of a conversation: a dict with `messages` or `conversations`, and perhaps
        `tools`. Messages after the last answer are left out. Throws UserError with `where` and the number of the message."""
        messages = normalised(row, where)
        if not parse_special:
            self._check_special(messages, where)
        tools = row.get("tools") or None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise UserError(f'{where}: "tools" is text that is not JSON: {error}') from None
        documents = []
        for i, message in enumerate(messages):
            # Weight 0 is OpenAI's way to keep an answer from being learned; a greeting that opens a chat answers nothing.
            if message["role"] != "assistant" or message.get("weight") == 0 or i == 0:
                continue
            whole = self.render(messages[:i + 1], tools, where)
            answer = (self._begin(messages[:i + 1], tools, whole, where), self._end(whole))
            if documents and whole.startswith(documents[-1][0]):
                documents[-1] = (whole, documents[-1][1] + [answer])
            else:
                documents.append((whole, [answer]))
        if not documents:
            raise UserError(f"{where}: no message is an answer to learn (role assistant, not the first message, weight not 0); leave the "
                            "conversation out")
        return documents

    def _begin(self, messages, tools, whole, where):
        """Where the answer, the last message, begins in `whole`: behind the longest prompt that `whole` begins with. With
        enable_thinking = false that contains the empty thinking of an answer that has none."""
        before = messages[:-1]
        prompts = [self.render(before, tools, where, prompt=True)]
        if "enable_thinking" in self.text and "enable_thinking" not in self.arguments:
            prompts.append(self.render(before, tools, where, prompt=True, enable_thinking=False))
        fitting = [prompt for prompt in prompts if whole.startswith(prompt)]
        if not fitting:
            raise UserError(
                f"{where}: message {len(messages)}: can't tell where the answer begins: the chat template of {self.name} renders the "
                f"{len(before)} messages before it, with the prompt for an answer, as text that the conversation does not begin with "
                f"({first_difference(prompts[0], whole)}). Give a template whose text only grows with the messages by --template")
        begin = max(map(len, fitting))
        if "add_generation_prompt" in self.text:
            return begin
        # The prompt may lack a header that the answer gets: what two other answers have in common at their beginning.
        others = [self.render([*before, {"role": "assistant", "content": content}], tools, where) for content in ("A", "B")]
        header = common(*others)
        return header if whole[:header] == others[0][:header] and whole[begin:header].strip() else begin

    def _end(self, whole):
        """Behind the end-of-turn token, if the last thing in `whole` but white space is a special token; else its end."""
        stripped = whole.rstrip()
        return len(stripped) if any(stripped.endswith(token) for token in self.special) else len(whole)

    def _check_special(self, messages, where):
        for number, message in enumerate(messages, 1):
            text = json.dumps(message, ensure_ascii=False)
            found = next((token for token in self.special if token in text), None)
            if found:
                raise UserError(f"{where}: message {number} ({message['role']}) contains {found}, which would become a special token and "
                                "could end the turn; remove it, or allow it by --special-tokens")


def normalised(row, where):
    """The messages as {role, content, ...} with text as content, of either way of writing them."""
    key = next((key for key in KEYS[:2] if row.get(key) is not None), None)
    if key is None:
        raise UserError(f'{where}: no key "messages" (or "conversations"); it has {", ".join(map(repr, row)) or "none"}')
    if not isinstance(row[key], list) or not row[key]:
        raise UserError(f'{where}: "{key}" is not a list of messages with at least one in it')
    messages = []
    for number, message in enumerate(row[key], 1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{here} is of type {type(message).__name__}, not an object with role and content")
        message = {name: value for name, value in message.items() if value is not None}
        role = message.pop("role", None) or message.pop("from", None)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{here} has the unknown role {role!r}; known are {', '.join(ROLES)}")
        content = message.pop("content", message.pop("value", None))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            kind = "no content" if content is None else f"content of type {type(content).__name__}"
            raise UserError(f"{here} ({role}) has {kind}; text is wanted, or a list of parts of type text")
        messages.append({"role": ROLES[role], "content": content, **message})
    return messages


def common(one, two):
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def first_difference(prompt, whole):
    at = common(prompt, whole)
    return f"after {at} characters {prompt[at:at + 24]!r} stands against {whole[at:at + 24]!r}"


def learned(offsets, answers):
    """uint8 for each token: 1 where it has a character of an answer, which makes it count when it is the label. `offsets`: the
    characters [begin, end) of each token; several tokens of one character, and tokens of none, are possible."""
    begin_T, end_T = numpy.array(offsets, dtype=numpy.int64).reshape(-1, 2).T
    end_T = numpy.maximum(end_T, begin_T + 1)
    mask_T = numpy.zeros(len(begin_T), dtype=numpy.uint8)
    for begin, end in answers:
        mask_T[(begin_T < end) & (end_T > begin)] = 1
    return mask_T
