"""A reward of a user's own: the share of an answer's characters that are digits."""


def closeness(completions, **columns):
    texts = [messages[0]["content"] for messages in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def explodes(completions, **columns):
    raise ZeroDivisionError("as it was told to")
