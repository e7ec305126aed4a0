"""Every prompt and worked example of the project, as functions that return messages; nothing is filled in elsewhere.

Standard library only. Changing a simulator prompt changes `simulate.client.memo_id`, so old simulations are not reused.
"""

from __future__ import annotations

import json
from typing import NamedTuple, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates and endpoints take it."""

    role: str
    content: str


PLAIN_QUESTION: Message = {"role": "user", "content": "Is water wet? Answer with one word."}
"""Asked of an LLM that fails, to see whether it is down."""

# Simulator: rates every token of a sequence for one rule.

UNKNOWN = "unknown"
"""Stands where a rating is asked for; it is read from the logits at the tab before this word."""

_SIMULATOR_TASK = """\
A detector inside a language model reads text token by token. You get a description of what makes the detector respond \
and a list of tokens. Give each token a rating: 0 if the detector stays silent, up to 5 if it responds at full \
strength. Most tokens are 0. Ratings that are not known are written as unknown."""


class WorkedExample(NamedTuple):
    """A rule, and the rating of every token of a text."""

    rule: str
    ratings: tuple[tuple[str, int | None], ...]
    """Tokens with their ratings; None is written as unknown."""


def _example(rule: str, text: str, **ratings: int) -> WorkedExample:
    """Ratings by token; tokens are split at `|`, and those before `#` are unknown."""
    hidden, _, known = text.partition("#")
    unknown = tuple((token, None) for token in hidden.split("|"))
    return WorkedExample(rule, unknown + tuple((token, ratings.get(token.strip(), 0)) for token in known.split("|")))


SIMULATOR_EXAMPLES = (
    _example(
        "the word 'bread', 'loaf', 'flour'",
        "She| kne|aded| the# flour| with| water| and| left| the| lo|af| to| rise|.",
        flour=5, lo=4, af=5,
    ),
    _example(
        "words for rivers, lakes and other bodies of water",
        "The| road| turns# north| at| the| lake|,| crosses| a| stream| and| ends| in| town|.",
        lake=5, stream=4,
    ),
    _example(
        "the word 'quickly', 'fast', 'rapid'",
        "Our| bus| was| late#,| so| we| walked| fast| through| the| rain| to| Linden| Street|.",
        fast=5,
    ),
    _example(
        "numbers written as digits",
        "Ord|er| 4|71| was# shipped| on| May| 9| from| the| ware|house| in| Le|eds|.",
        **{"9": 5},
    ),
    _example(
        "verbs of refusal such as 'refuse' or 'reject'",
        "They# re|jected| the| offer| and| wrote| a| long| letter| about| it|.",
        re=3, jected=5,
    ),
)  # fmt: skip
"""Mostly zeros, some words in pieces, each begun with unknown ratings as the real question is."""


def simulator_messages(rule: str, num_examples: int) -> list[Message]:
    """Task, worked examples and the rule; the ratings of the sequence itself are the answer that follows.

    There is no system turn, since some chat templates refuse one.
    """
    messages: list[Message] = []
    for example in SIMULATOR_EXAMPLES[:num_examples]:
        messages.append({"role": "user", "content": _simulator_question(example.rule)})
        messages.append({"role": "assistant", "content": rating_lines(example.ratings)})
    messages.append({"role": "user", "content": _simulator_question(rule)})
    messages[0]["content"] = f"{_SIMULATOR_TASK}\n\n{messages[0]['content']}"
    return messages


def _simulator_question(rule: str) -> str:
    return f"The detector responds to: {rule}\nTokens and ratings:"


def rating_lines(ratings: tuple[tuple[str, int | None], ...]) -> str:
    """One line per token: the token, a tab, its rating or the word unknown."""
    return "\n".join(f"{token}\t{UNKNOWN if rating is None else rating}" for token, rating in ratings)


# Rater: how abstract a rule is.

_ABSTRACTNESS_TASK = """\
A detector inside a language model responds to some words of a text. Each line below holds a description of what it \
responds to and, after a tab, a rating from 0 to 5 of how abstract the description is: 0 if it names the very words, \
1 for forms of one word, 2 for a short list or a kind of thing that can be pointed at, 3 for a topic, 4 for a role or \
relation that depends on the sentence, 5 for a notion that no list of words would cover. Ratings that are not known \
are written as unknown."""

ABSTRACTNESS_EXAMPLES: tuple[tuple[str, int], ...] = (
    ("the word 'bread'", 0),
    ("doubt that is hinted at and never spoken", 5),
    ("kinds of trees", 2),
    ("the one who receives something in an exchange", 4),
    ("forms of the verb 'carry'", 1),
    ("trade between countries", 3),
    ("the comma", 0),
    ("a promise that the speaker does not mean to keep", 5),
)
"""Descriptions with their ratings, every rating at least once and in no order."""


def abstractness_messages() -> list[Message]:
    """The task, and the lines with which the answer begins; the description to be rated is its next line."""
    return [
        {"role": "user", "content": f"{_ABSTRACTNESS_TASK}\n\nDescriptions and ratings:"},
        {"role": "assistant", "content": rating_lines(ABSTRACTNESS_EXAMPLES)},
    ]


# Explainer: says in words what a feature fires on.

_EXPLAINER_TASK = """\
One feature of a language model fires on some tokens of a text and stays silent on the rest. You see short texts in \
which it fires. The tokens that make it fire stand between << and >>, and are listed below each text with how strongly \
it fires, from 1 to 5. Find what these tokens, or the places where they stand, have in common. Describe what the \
feature fires on, not the texts as a whole; be as specific as the texts allow."""

_NEGATIVES_TASK = """\
After them come texts on which the feature is silent, though some are much like the others: what you say must not hold \
of any token in them."""

_HOLISTIC_TASK = """\
Under some texts stand the tokens without which the feature would fire less, the most important first: they are what \
it needs, also where it does not fire on them."""

_RULE = """\
Each rule is an object with "activates_on", a short description of tokens that make the feature fire, and "strength", \
a whole number from 0 to 5 that says how strongly. Use a second rule only for tokens that the first does not cover."""

_STRUCTURED_ANSWER = "Answer with a JSON list of at most {rule_cap} rules and nothing else. " + _RULE
_OBJECT_ANSWER = (
    'Answer with a JSON object {{"rules": [...]}}, a list of at most {rule_cap} rules, and nothing else. ' + _RULE
)
_STRING_ANSWER = (
    "Answer with one short sentence that describes the tokens that make the feature fire, and nothing else."
)


class AnswerForm(NamedTuple):
    """What an explainer is asked to write; nothing else in a prompt depends on it."""

    asked: str
    asked_again: str
    example: str
    """The worked example's answer."""


class MarkedRecord(NamedTuple):
    """One text as the explainer sees it."""

    tokens: tuple[str, ...]
    strengths: tuple[int, ...]
    """0-5 for each token."""
    needed: tuple[str, ...] = ()
    """Tokens without which the feature would fire less, the most important first."""


_EXPLAINER_RECORDS = (
    MarkedRecord(
        (" The", " old", " oak", " lost", " a", " branch", " in", " the", " storm"),
        (0, 0, 5, 0, 0, 2, 0, 0, 0),
        (" oak", " branch"),
    ),
    MarkedRecord(
        (" A", " row", " of", " birch", " trees", " lined", " the", " lane"),
        (0, 0, 0, 5, 4, 0, 0, 0),
        (" birch", " trees", " row"),
    ),
)
_EXPLAINER_NEGATIVES = (
    MarkedRecord((" The", " branch", " of", " the", " bank", " in", " town", " was", " closed"), (0,) * 9),
    MarkedRecord((" A", " row", " of", " lamps", " lined", " the", " lane"), (0,) * 7),
)
_STRUCTURED_EXAMPLE = (
    '[{"activates_on": "names of kinds of trees, and the word trees", "strength": 5}, '
    '{"activates_on": "parts of a tree, such as a branch", "strength": 2}]'
)
_STRING_EXAMPLE = "names of kinds of trees, and more weakly parts of a tree such as a branch"


def answer_form(rule_cap: int, structured: bool, as_object: bool = False) -> AnswerForm:
    """
    Args:
        as_object: The list stands in an object, as endpoints that enforce JSON want it.
    """
    if not structured:
        return AnswerForm(_STRING_ANSWER, "Answer with one sentence.", _STRING_EXAMPLE)
    asked = (_OBJECT_ANSWER if as_object else _STRUCTURED_ANSWER).format(rule_cap=rule_cap)
    again = f"Answer in the same form: the JSON {'object' if as_object else 'list'} and nothing else."
    return AnswerForm(asked, again, as_rules_object(_STRUCTURED_EXAMPLE) if as_object else _STRUCTURED_EXAMPLE)


def as_rules_object(rules: str) -> str:
    """A JSON list of rules as the object that holds it."""
    return f'{{"rules": {rules}}}'


def explainer_messages(
    records: list[MarkedRecord],
    negatives: list[MarkedRecord],
    form: AnswerForm,
    few_shots: bool,
    holistic: bool,
) -> list[Message]:
    """Task, a worked example if asked for, and the feature's records; the example has the parts that the records have.

    Args:
        negatives: Texts on which the feature is silent; they are spoken of only where there are any.
        holistic: Shows the tokens that each text needs.
    """
    parts = [_EXPLAINER_TASK, *([_NEGATIVES_TASK] if negatives else []), *([_HOLISTIC_TASK] if holistic else [])]
    task = f"{' '.join(parts)}\n{form.asked}"
    shown = _render_records(records, negatives, holistic)
    if not few_shots:
        return [{"role": "user", "content": f"{task}\n\n{shown}"}]
    worked = _render_records(list(_EXPLAINER_RECORDS), list(_EXPLAINER_NEGATIVES) if negatives else [], holistic)
    return [
        {"role": "user", "content": f"{task}\n\n{worked}"},
        {"role": "assistant", "content": form.example},
        {"role": "user", "content": f"Another feature, with the same form of answer.\n\n{shown}"},
    ]


def revision_messages(answer: str, feedback: str, form: AnswerForm) -> list[Message]:
    """Continues a conversation: the answer given, how it did, and the request for a better one."""
    return [
        {"role": "assistant", "content": answer},
        {
            "role": "user",
            "content": f"{feedback}\n\nWrite a better description of the same feature. {form.asked_again}",
        },
    ]


class TokenError(NamedTuple):
    """A token on which prediction and truth differ."""

    token: str
    predicted: int
    actual: int


def feedback_text(score: float | None, worst: list[tuple[MarkedRecord, list[TokenError]]]) -> str:
    """How an explanation did: its score, and token by token the records that it gets most wrong."""
    said = "could not be computed" if score is None else f"is {score:.2f}"
    lines = [
        "Activations were predicted from this description alone and compared with the true ones. "
        f"The correlation {said} (1 is perfect, 0 is chance). The text that it gets most wrong:"
    ]
    for record, errors in worst:
        lines.append(f"Text: {_marked_text(record)}")
        lines += [f"{_quoted(e.token)}: predicted {e.predicted}, actual {e.actual}" for e in errors]
    return "\n".join(lines)


def falsifier_text(tokens: tuple[str, ...], predicted: list[float]) -> str:
    """A text that sounds like the description although the feature is silent on it, and what was predicted there."""
    strengths = tuple(min(max(round(value), 0), 5) for value in predicted)
    fired = ", ".join(
        f"{_quoted(token)} {strength}" for token, strength in zip(tokens, strengths, strict=True) if strength
    )
    return (
        "The feature stays silent on the whole of another text, but the description sounds like it. "
        f"Say what sets the two apart.\nText: {_marked_text(MarkedRecord(tokens, (0,) * len(tokens)))}\n"
        f"Wrongly predicted: {fired}"
    )


# Further scorers: an LLM judges texts by a description, or finds the one that does not belong.

_FEATURE_TASK = """\
One feature of a language model fires on some tokens of a text and stays silent on the rest."""

_DESCRIPTION_TASK = """\
You get a description of the tokens on which it fires and some numbered texts. The description may name several kinds \
of tokens, divided by semicolons; each of them counts."""

_DETECTION_TASK = """\
Say for each text whether the feature fires anywhere in it, going by the description alone: 1 if it does, 0 if it \
does not."""

_FUZZING_TASK = """\
In each text some tokens stand between << and >>. In some texts they are the ones on which the feature fires, in \
others they were picked blindly. Say for each text, going by the description alone, whether the marked tokens are \
right: 1 if they are tokens on which the feature fires, 0 if not."""

_VERDICTS_ANSWER = """\
Any number of texts may get a 1, all or none of them. Answer with a JSON list of {count}, one for each text in order, \
and nothing else."""

_VERDICTS_AGAIN = """\
That is not a JSON list of {count}, one for each text in order. Answer with that list and nothing else."""

_INTRUDER_TASK = """\
You get some numbered texts. In all of them but one the feature fires on the tokens between << and >>, and these have \
something in common. In one text, the intruder, the feature is silent, and the marked tokens were picked blindly. Find \
the intruder. Answer with its number and nothing else."""

_INTRUDER_AGAIN = """\
That is not one number from 1 to {count}. Answer with the number of the text that does not belong, and nothing else."""

_JUDGE_DESCRIPTION = "names of kinds of trees; parts of a tree, such as a branch"
_JUDGE_RECORDS = (
    _EXPLAINER_RECORDS[0],
    MarkedRecord((" Our", " branch", " in", " town", " was", " closed", " on", " Monday"), (0, 5, 0, 0, 0, 0, 0, 0)),
    MarkedRecord((" They", " planted", " an", " elm", " by", " the", " gate"), (0, 0, 0, 5, 0, 0, 0)),
)
_INTRUDER_RECORDS = (
    *_EXPLAINER_RECORDS,
    MarkedRecord((" Our", " train", " was", " late", " on", " Monday"), (0, 0, 0, 5, 0, 0)),
    _JUDGE_RECORDS[2],
)


def detection_messages(description: str, records: list[MarkedRecord]) -> list[Message]:
    """Asks which texts fit a description; nothing is marked in them."""
    bare = [record._replace(strengths=(0,) * len(record.tokens)) for record in records]
    example = [record._replace(strengths=(0,) * len(record.tokens)) for record in _JUDGE_RECORDS]
    return _judge_messages(_DETECTION_TASK, description, bare, example)


def fuzzing_messages(description: str, records: list[MarkedRecord]) -> list[Message]:
    """Asks in which texts the marked tokens fit a description."""
    return _judge_messages(_FUZZING_TASK, description, records, list(_JUDGE_RECORDS))


def _judge_messages(
    task: str, description: str, records: list[MarkedRecord], example: list[MarkedRecord]
) -> list[Message]:
    asked = _VERDICTS_ANSWER.format(count=_verdicts(len(records)))
    first = f"{_FEATURE_TASK} {_DESCRIPTION_TASK} {task}\n{_VERDICTS_ANSWER.format(count=_verdicts(len(example)))}"
    return [
        {"role": "user", "content": f"{first}\n\nDescription: {_JUDGE_DESCRIPTION}\n{_numbered(example)}"},
        {"role": "assistant", "content": "[1, 0, 1]"},
        {
            "role": "user",
            "content": f"Another feature. {asked}\n\nDescription: {_on_one_line(description)}\n{_numbered(records)}",
        },
    ]


def intruder_messages(records: list[MarkedRecord]) -> list[Message]:
    """Asks which of some marked texts does not belong with the others."""
    return [
        {"role": "user", "content": f"{_FEATURE_TASK} {_INTRUDER_TASK}\n\n{_numbered(list(_INTRUDER_RECORDS))}"},
        {"role": "assistant", "content": "3"},
        {
            "role": "user",
            "content": f"Another feature, with the same form of answer.\n\n{_numbered(records)}",
        },
    ]


def asked_again(messages: list[Message], answer: str, request: str) -> list[Message]:
    """The conversation after an answer that could not be read."""
    # Endpoints refuse an empty turn, and an essay need not be read again.
    return [
        *messages,
        {"role": "assistant", "content": answer.strip()[:500] or "..."},
        {"role": "user", "content": request},
    ]


def verdicts_again(count: int) -> str:
    return _VERDICTS_AGAIN.format(count=_verdicts(count))


def intruder_again(count: int) -> str:
    return _INTRUDER_AGAIN.format(count=count)


def _verdicts(count: int) -> str:
    return f"{count} number{'' if count == 1 else 's'}, each 0 or 1"


def _numbered(records: list[MarkedRecord]) -> str:
    return "\n".join(f"Text {number}: {_marked_text(record)}" for number, record in enumerate(records, 1))


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


# Surprisal: a language model, which need not be trained to answer, reads a text behind a description of it.

NO_DESCRIPTION = "texts of all kinds that have nothing in common"
"""Stands where the description would, so that losses with and without one are compared at the same places."""

_SURPRISAL_HEAD = """\
Excerpts are sorted by what they have in common. Each group begins with a description of it.

Description: names of kinds of trees; parts of a tree, such as a branch
Excerpt: The old oak lost a branch in the storm

Description: numbers written as digits
Excerpt: Order 471 was shipped on May 9

Description: """


def surprisal_prefix(description: str) -> str:
    """What stands before a text whose loss is taken; the text itself begins with a space, as a rule."""
    return f"{_SURPRISAL_HEAD}{_on_one_line(description)}\nExcerpt:"


def _render_records(records: list[MarkedRecord], negatives: list[MarkedRecord], holistic: bool) -> str:
    lines = []
    for number, record in enumerate(records, 1):
        lines += [f"Text {number}: {_marked_text(record)}", _fires_on(record)]
        if holistic and record.needed:
            lines.append("Fires less without: " + ", ".join(_quoted(token) for token in record.needed))
    lines += [f"Silent text {number}: {_marked_text(record)}" for number, record in enumerate(negatives, 1)]
    return "\n".join(lines)


def _marked_text(record: MarkedRecord) -> str:
    """The text on one line, with << >> around tokens that fire."""
    parts = []
    for token, strength in zip(record.tokens, record.strengths, strict=True):
        bare = token.lstrip()
        space = " " if len(bare) < len(token) else ""
        parts.append(f"{space}<<{bare}>>" if strength and bare else token)
    return " ".join("".join(parts).split())


def _fires_on(record: MarkedRecord) -> str:
    fired = [(t, s) for t, s in zip(record.tokens, record.strengths, strict=True) if s]
    return "Fires on: " + (", ".join(f"{_quoted(token)} {strength}" for token, strength in fired) or "nothing")


def _quoted(token: str) -> str:
    """The token on one line in quotes."""
    return json.dumps(token.strip() or token, ensure_ascii=False)
