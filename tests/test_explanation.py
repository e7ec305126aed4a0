import json

import jsonschema
import pytest

from rayinterp.explanation import (
    ParseError,
    Rule,
    claims,
    from_json,
    parse_string,
    parse_structured,
    render,
    rules_schema,
    to_json,
    wording,
)

TREES = '[{"activates_on": "trees", "strength": 4}]'
DRAFT = '[{"activates_on": "wood", "strength": 4}]'


@pytest.mark.parametrize(
    "answer",
    [
        '[{"activates_on": "trees", "strength": 4}]',
        '```json\n[{"activates_on": "trees", "strength": 4}]\n```',
        'The texts [1-3] are about [wood]: [{"activates_on": "trees", "strength": 4}] I hope [this] helps.',
        '[{"activates_on": "trees", "strength": "4"},]',
        '[{"activates_on": " trees ", "strength": 4.0, "why": "seen"}]',
        '{"rules": [{"activates_on": "trees", "strength": 4}]}',
        '```json\n{"rules": [\n  {"activates_on": "trees", "strength": 4},\n]}\n``` as {"rules": []} asks',
    ],
)
def test_wrapping_is_forgiven(answer):
    assert parse_structured(answer, 5) == (Rule("trees", 4),)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "trees",
        "[]",
        "[1, 2]",
        '[{"activates_on": "", "strength": 4}]',
        '[{"activates_on": "trees"}]',
        '[{"activates_on": "trees", "strength": 4.5}]',
        '[{"activates_on": "trees", "strength": "strong"}]',
        '[{"activates_on": "trees", "strength": true}]',
        '[{"activates_on": "trees", "strength": "inf"}]',
        '[{"activates_on": "trees", "strength": "nan"}]',
        '[{"activates_on": ["trees"], "strength": 4}]',
        '[{"activates_on": "%s", "strength": 4}]' % ("trees " * 100),
        '[{"activates_on": "trees", "strength": 4}, {"activates_on": "lea',
        '{"rules": []}',
        '{"rules": {"activates_on": "trees", "strength": 4}}',
        '{"activates_on": "trees", "strength": 4}',
        '[{"activates_on": "\\ud800", "strength": 4}]',
        '[{"activates_on": "trees", "strength": 1%s}]' % ("0" * 400),
        '[{"activates_on": "trees", "strength": 1%s}]' % ("0" * 5000),
        '[{"a": ' * 5000,
        "[" * 20000,
        f"<think>\nPerhaps {TREES}",
        f"<think>{TREES}</think> I cannot say.",
        f"Perhaps {TREES}.\n</think>\nI cannot say.",
    ],
)
def test_meaning_is_not_guessed(answer):
    with pytest.raises(ParseError):
        parse_structured(answer, 5)


@pytest.mark.parametrize(
    "answer",
    [
        f"The old rules {DRAFT} miss birches; better: {TREES}",
        f"First {DRAFT.replace('4}', '4},')} and then {TREES.replace('4}', '4},')}",
        f"{DRAFT}\n{TREES}\n[{{}}] [{{",
        f"<think>\nPerhaps {DRAFT}?\n</think>\n\n{TREES}",
        f"<think>Perhaps {DRAFT}?</think>{TREES}",
        f"Perhaps {DRAFT}?\n</think>\n\n{TREES}",
    ],
)
def test_the_last_list_counts(answer):
    assert parse_structured(answer, 5) == (Rule("trees", 4),)


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_an_explanation_may_be_about_the_tags_of_a_thought(tag):
    rules = [{"activates_on": f"the tag {tag}", "strength": 4}]
    assert parse_structured(json.dumps(rules), 5) == (Rule(f"the tag {tag}", 4),)
    assert parse_string(f"the tag {tag} and what follows") == (Rule(f"the tag {tag} and what follows"),)


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ({"rules": [{"activates_on": "a", "strength": 0}]}, True),
        ({"rules": [{"activates_on": "a", "strength": 5}] * 3}, False),
        ({"rules": []}, False),
        ({"rules": [{"activates_on": "a", "strength": 6}]}, False),
        ({"rules": [{"activates_on": "a", "strength": 2.5}]}, False),
        ({"rules": [{"activates_on": "a"}]}, False),
        ([{"activates_on": "a", "strength": 5}], False),
    ],
)
def test_the_schema_admits_what_parses(answer, valid):
    schema = rules_schema(2)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(answer) == valid
    if valid:
        assert parse_structured(json.dumps(answer), 2)


def test_strengths_are_clamped_and_rules_capped():
    answer = json.dumps([{"activates_on": name, "strength": s} for name, s in (("a", 9), ("b", -2), ("c", 1))])
    assert parse_structured(answer, 2) == (Rule("a", 5), Rule("b", 0))


def test_a_string_explanation_is_one_rule_of_full_strength():
    assert parse_string('Explanation: "names of trees"\nmore') == (Rule("names of trees", 5),)
    with pytest.raises(ParseError):
        parse_string(' \n"..." ')
    with pytest.raises(ParseError):
        parse_string("trees " * 100)


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nIt fires on wood.\n</think>\n\nnames of trees",
        "It fires on wood.\n</think>\nnames of trees",
        "```text\nnames of trees\n```",
        "```\nnames of trees\n```",
        "Here is a short description:\nnames of trees",
        "Here it is:\n\n```text\nnames of trees\n```",
        "Explanation:\nnames of trees",
        "**Explanation:**\nnames of trees",
        'Here it is:\nExplanation: "names of trees"',
    ],
)
def test_a_string_explanation_is_found_in_its_wrapping(answer):
    assert parse_string(answer) == (Rule("names of trees", 5),)


def test_a_colon_at_the_end_of_all_there_is_announces_nothing():
    assert parse_string('what stands before a list, as in "such as":') == (
        Rule('what stands before a list, as in "such as":'),
    )
    for answer in ("Explanation:", "<think>\nnames of trees", "```text\n```"):
        with pytest.raises(ParseError):
            parse_string(answer)


def test_rules_of_strength_0_are_no_claims():
    assert claims((Rule("trees", 5), Rule("lamps", 0), Rule("twigs", 1))) == ("trees", "twigs")
    assert claims((Rule("lamps", 0),)) == ("lamps",)
    assert wording((Rule("trees", 5), Rule("lamps", 0), Rule("twigs", 1))) == "trees; twigs"


def test_json_round_trip_and_rendering():
    explanation = (Rule('the word "fr\u00eane"', 5), Rule("oaks", 2))
    assert from_json(to_json(explanation)) == explanation
    assert render(explanation) == 'the word "fr\u00eane"; oaks (2/5)'


def test_the_memo_key_is_the_rules_words_alone():
    assert Rule("oaks", 5).hash == Rule("oaks", 1).hash != Rule("oak", 5).hash
