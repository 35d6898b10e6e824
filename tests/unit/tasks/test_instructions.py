"""Verifiable instructions: each check, the prompts, and that every prompt can be followed."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.train import load_config
from opcd_nemo.context.sources import Context
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks.instruction_kinds import ALONE, KINDS, compatible, sentences, words
from opcd_nemo.tasks.instructions import (
    QUESTIONS,
    Instruction,
    InstructionPrompt,
    draw_prompts,
)
from opcd_nemo.types import Split

SIZES: dict[Split, int] = {"train": 400, "validation": 100, "test": 300}

# kind: (arguments, texts that follow it, texts that do not)
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "min_words": ({"n": 3}, ["a b c", "one, two: 3", "a\nb\n\nc d"], ["a b", "a b -", "a-b-c"]),
    "max_words": ({"n": 2}, ["a", "a b", "a - b"], ["a b c", "a\nb\nc"]),
    "min_sentences": (
        {"n": 2},
        ["One. Two.", "One! Two", "One\nTwo", 'He said "no." Then he left.'],
        ["One.", "It costs 3.50 in all.", "e.g. this", "One. ...", "One two three"],
    ),
    "max_sentences": (
        {"n": 2},
        ["One.", "One. Two?", "Mr. Fox runs. He rests.", "Wait... what?"],
        ["One. Two. Three.", "One\nTwo\nThree", "Yes! No! Yes!"],
    ),
    "short_sentences": (
        {"n": 3},
        ["One two three. One two three!", "One two three\none"],
        ["One two three four.", "One. One two three four. One.", "One two, three four"],
    ),
    "paragraphs": (
        {"n": 2},
        ["a\n\nb", "a\nb\n\nc", "a\n \t\nb", "a\n\n\n\nb"],
        ["a", "a\nb", "a\n\nb\n\nc"],
    ),
    "lower_case": ({}, ["all of it, 1 2.", "é"], ["All", "1 2 3", "É", "no iPhone"]),
    "upper_case": ({}, ["ALL OF IT, 1 2.", "É"], ["ALL of it", "1 2 3", "ALL é"]),
    "capital_words": (
        {"n": 2},
        ["NASA and ESA", "NO, NO", "A BIG DOG"],
        ["NASA", "I A B", "NASAesa ESAx", "Nasa Esa"],
    ),
    "no_comma": ({}, ["a; b", "'"], ["a, b", "3,5", "a\uff0c b", "a\u3001b"]),
    "keyword": (
        {"word": "green", "n": 2},
        ["green Green", "(green)-green", "GREEN? green!"],
        ["green", "green greener evergreen", "green_green"],
    ),
    "forbidden_word": (
        {"word": "is"},
        ["this island", "are", "isn_t"],
        ["it is", "IS it?", "it is.", "isn't is", "what is-is"],
    ),
    "start": (
        {"phrase": "In short:"},
        ["In short: yes", "In short:yes"],
        ["in short: yes", "So: In short: yes", "In short:", '"In short: yes"', "**In short:** a"],
    ),
    "end": (
        {"phrase": "The end."},
        ["It stops. The end.", "x The end."],
        ["The end.", "It stops. The end", "The end. Really.", "It stops. the end.", "x The end.)"],
    ),
    "question_end": ({}, ["Is it?", "Yes. No?"], ["?", "Is it? Yes.", "Is it?)", "Is it"]),
    "repeat": (
        {"question": "Why is it so?"},
        ["Why is it so? It is.", "Why is it so?\nIt is"],
        ["Why is it so?", "why is it so? It is.", "It is. Why is it so?", "Why is it so It is."],
    ),
    "quoted": (
        {},
        ['"yes"', '"a\nb"', "\"it's\""],
        ['"yes', 'yes"', '"', '""', '" "', '"a" or "b"', "'yes'", "\u201cyes\u201d", '"yes".'],
    ),
    "json": (
        {"first": "title", "second": "text"},
        ['{"title": "a", "text": "b"}', '{"text": "b",\n "title": "a"}'],
        [
            '{"title": "a"}',
            '{"title": "a", "text": ""}',
            '{"title": "a", "text": 3}',
            '{"title": "a", "text": "b", "more": "c"}',
            '```json\n{"title": "a", "text": "b"}\n```',
            '["title", "text"]',
            "{'title': 'a', 'text': 'b'}",
            "[" * 100_000,
            "title",
        ],
    ),
    "bullets": (
        {"n": 2},
        ["- a\n- b", "Two:\n- a\n- b\nDone.", "  - a\n - b"],
        ["- a", "- a\n- b\n- c", "* a\n* b", "- a\n-b", "- a\n- ", "a - b - c\n- d", "- a\n--- b"],
    ),
    "numbered": (
        {"n": 2},
        ["1. a\n2. b", "Two:\n1. a\nmore of it\n2. b"],
        ["1. a", "1. a\n3. b", "2. a\n1. b", "1) a\n2) b", "1. a\n2. b\n3. c", "1. a 2. b"],
    ),
    "sections": (
        {"n": 2, "marker": "PART"},
        ["PART 1\na\nPART 2\nb", "Here:\nPART 1: a\nPART 2: b", "PART 1 a\n\nPART 2 b"],
        [
            "PART 1\na",
            "PART 1\nPART 2\nb",
            "PART 1\na\nPART 2\n",
            "PART 2\na\nPART 1\nb",
            "Part 1\na\nPart 2\nb",
            "PART 1\na\nPART 2\nb\nPART 3\nc",
            "PART 1a\na\nPART 2\nb",
            "in PART 1 a PART 2 b",
        ],
    ),
    "two_answers": (
        {},
        ["a\n******\nb", "a\n\n ****** \n\nb"],
        ["a\n******\na", "a\n*****\nb", "a ****** b", "a\n******\n", "******\nb", "a\n*******\nb",
         "a\n******\nb\n******\nc"],
    ),
    "title": (
        {},
        ["<<A title>> text", "text\n<<T>>"],
        ["<A title>", "<<>>", "<< >>", "<<A\ntitle>>", "<<A title>", "A title"],
    ),
    "postscript": (
        {},
        ["Text.\nP.S. More.", "Text.\n\nP.S. More of it"],
        ["P.S. More.", "Text. P.S. More.", "Text.\nPS More.", "Text.\nP.S.", "Text.\nP.S. a\nb",
         "Text.\nP.S.More", "Text.\nAnd P.S. More."],
    ),
    "letter": ({"letter": "b", "n": 3}, ["bBb", "a bob be"], ["bb", "a", "ppp"]),
    "placeholders": (
        {"n": 2},
        ["[a] [b c]", "Dear [name],\n[text]"],
        ["[a]", "[] [ ] [a]", "(a) (b)", "[a](b) [c]", "[[a]", "[a\nb] [c]"],
    ),
    "highlights": (
        {"n": 2},
        ["*a* and *b c*", "(*a*) *b*."],
        ["*a*", "**a** **b**", "* a * b *", "a*b*c*d*e", "- a\n* b\n* c", "*a\nb* *c*"],
    ),
    "numbers": ({"n": 2}, ["1 and 2", "3.5 of 10.", "(7)-(8)"], ["12", "one two", "a1 b2", "3.5"]),
    "no_digits": ({}, ["one"], ["1", "a1", "\u0663"]),
    "number_only": (
        {},
        ["0", "7", "42", "100"],
        ["101", "-1", "007", "4.5", "about 4", "4.", "four", "4 5", "50%", "\u0663"],
    ),
}  # fmt: skip


def instruction(kind: str) -> Instruction:
    return Instruction(kind=kind, arguments=CASES[kind][0])


def test_every_kind_has_cases_for_exactly_its_slots() -> None:
    assert CASES.keys() == KINDS.keys()
    assert len(KINDS) >= 15
    for kind, (arguments, follow, break_) in CASES.items():
        slots = KINDS[kind].choices.keys() | ({"question"} if kind == "repeat" else set())
        assert arguments.keys() == slots, kind
        assert follow, kind
        assert break_, kind
        assert "{" not in instruction(kind).text, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_takes_what_follows_and_nothing_else(kind: str) -> None:
    _, follow, break_ = CASES[kind]
    for text in follow:
        assert instruction(kind).followed(text), text
        assert instruction(kind).followed(f"\n {text}\n\n"), "blanks around do not count"
    for text in break_:
        assert not instruction(kind).followed(text), text


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_answer_follows_nothing(text: str) -> None:
    assert [kind for kind in KINDS if instruction(kind).followed(text)] == []


OCCURRING = {
    "capital_words": "NASA ESA USA",
    "title": "<<My title>>",
    "placeholders": "[name] [place] [thing]",
    "highlights": "*this part* *that part*",
    "numbers": "7 sheep 8 cows 9 hens",
}


def main_part(chosen: dict[str, Any]) -> str:
    """The opening, what has to occur in one sentence, and as much more as has to be."""
    opening = chosen.get("repeat", {}).get("question") or chosen.get("start", {}).get("phrase", "")
    asked = [OCCURRING[kind] for kind in chosen if kind in OCCURRING]
    if "keyword" in chosen:
        asked += [chosen["keyword"]["word"]] * chosen["keyword"]["n"]
    if "letter" in chosen:
        asked += [chosen["letter"]["letter"] * chosen["letter"]["n"]]
    text = f"{opening} {' '.join(asked)}{'.' if asked else ''}"
    num_words = chosen.get("min_words", {}).get("n", 0)
    num_sentences = chosen.get("min_sentences", {}).get("n", 0)
    while words(text) < num_words or len(sentences(text)) < num_sentences:
        text += " We look at it calmly."
    return text


def structure(chosen: dict[str, Any]) -> str:
    (kind,) = [one for one in chosen if one in STRUCTURES] or [None]
    n = chosen.get(kind, {}).get("n", 0)
    return {
        None: "",
        "bullets": "\n- we go on" * n + "\n",
        "numbered": "".join(f"\n{i + 1}. we go" for i in range(n)) + "\n",
        "sections": "".join(
            f"\n{chosen.get('sections', {}).get('marker')} {i + 1}\nWe go on." for i in range(n)
        ),
        "two_answers": "\nWe go.\n******\nWe do not go.\n",
        "paragraphs": "\n\nWe go on." * (n - 1),
    }[kind]


STRUCTURES = ("bullets", "numbered", "sections", "two_answers", "paragraphs")


def closing(chosen: dict[str, Any], so_far: str) -> str:
    if "end" in chosen:
        before = "" if words(so_far) else "We do. "
        return f" {before}{chosen['end']['phrase']}"
    if "question_end" in chosen:
        return " Do we?"
    if "postscript" in chosen:
        return " We end here.\nP.S. We do."
    opening_alone = len(sentences(so_far)) < 2 and ("start" in chosen or "repeat" in chosen)
    return " We do." if opening_alone or not words(so_far) else ""


def witness(prompt: InstructionPrompt) -> str:
    """An answer that follows everything, if one can be written at all."""
    chosen = {one.kind: dict(one.arguments) for one in prompt.instructions}
    if "json" in chosen:
        return f'{{"{chosen["json"]["first"]}": "a", "{chosen["json"]["second"]}": "b"}}'
    if "number_only" in chosen:
        return "50"
    text, more = main_part(chosen), structure(chosen)
    if more and not words(text):
        text = "We go."
    text += more
    text = (text + closing(chosen, text)).strip()
    if "quoted" in chosen:
        text = f'"{text}"'
    if "lower_case" in chosen:
        return text.lower()
    return text.upper() if "upper_case" in chosen else text


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_contradicts_itself(split: Split, seed: int) -> None:
    for prompt in draw_prompts(split, SIZES[split], seed):
        text = witness(prompt)
        missed = [
            one.text
            for one, followed in zip(prompt.instructions, prompt.followed(text), strict=True)
            if not followed
        ]
        assert not missed, (prompt.text, text, missed)


def test_every_allowed_pair_can_be_followed_with_every_choice() -> None:
    def choices(kind: str) -> list[Instruction]:
        slots = KINDS[kind].choices
        made = [dict(zip(slots, values, strict=True)) for values in product(*slots.values())]
        if kind == "repeat":
            made = [{"question": max(QUESTIONS, key=words)}]
        return [Instruction(kind=kind, arguments=arguments) for arguments in made]

    tried = 0
    for one, other in product(KINDS, KINDS):
        if one < other and compatible(one, other):
            for pair in product(choices(one), choices(other)):
                prompt = InstructionPrompt(question=QUESTIONS[0], instructions=pair)
                assert all(prompt.followed(witness(prompt))), (prompt.text, witness(prompt))
                tried += 1
    assert tried > 2500


def test_compatibility_is_symmetric_and_says_no_to_itself() -> None:
    for one, other in product(KINDS, KINDS):
        assert compatible(one, other) == compatible(other, one)
    assert not any(compatible(kind, kind) for kind in KINDS)
    assert not any(compatible(kind, alone) for kind in KINDS for alone in ALONE)


def test_prompts_have_one_to_three_instructions_and_every_kind() -> None:
    prompts = draw_prompts("test", SIZES["test"], 0)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 300
    counts = [len(prompt.instructions) for prompt in prompts]
    assert {n: counts.count(n) >= 80 for n in (1, 2, 3)} == {1: True, 2: True, 3: True}
    used = [one.kind for prompt in prompts for one in prompt.instructions]
    assert {kind for kind in KINDS if used.count(kind) >= 5} == set(KINDS)


def test_prompts_are_pure_in_their_seed_and_the_first_ones_stay() -> None:
    assert draw_prompts("test", 250, 0) == draw_prompts("test", 300, 0)[:250]
    assert draw_prompts("test", 50, 0) != draw_prompts("test", 50, 1)


def test_the_splits_share_no_question() -> None:
    asked = [{p.question for p in draw_prompts(split, 300, 0)} for split in SIZES]
    assert sum(map(len, asked)) == len(set.union(*asked)) == len(set(QUESTIONS)) == 48


def test_a_question_breaks_no_instruction_by_itself() -> None:
    forbidden = KINDS["forbidden_word"].choices["word"]
    for question in QUESTIONS:
        assert "," not in question
        assert not any(letter.isdigit() for letter in question)
        assert words(question) <= 12
        assert len(sentences(question)) == 1
        assert not set(forbidden) & set(question.lower().split()), question


def built(**changed: Any) -> Any:
    config = load_config(compose("train", ["task=instructions"])).task
    return build_plug({**config, **changed})


def test_the_task_scores_prompts_or_shares_of_instructions() -> None:
    prompts = draw_prompts("test", 300, 0)
    lasting = set(OCCURRING) | {"keyword", "letter", "min_words", "start", "repeat", "no_digits"}
    kinds = [[one.kind for one in prompt.instructions] for prompt in prompts]
    place = next(
        n for n, k in enumerate(kinds) if len(k) == 2 and "no_comma" in k and lasting & set(k)
    )
    right = witness(prompts[place])
    for level, halfway in (("prompt", 0.0), ("instruction", 0.5)):
        task = built(level=level)
        replies = {right: 1.0, f"{right}, yes": halfway, f"<think>A, B</think>{right}": 1.0}
        for reply, score in replies.items():
            episode = task.episodes("test", 0, 300)[place]
            episode.reply(reply)
            assert (episode.score(), episode.answered) == (score, True), (level, reply)


@pytest.mark.parametrize("reply", ["", " \n", "<think>still at it", "<think>so</think>\n"])
def test_a_reply_without_an_answer_is_no_answer(reply: str) -> None:
    (episode,) = built().episodes("test", 0, 1)
    episode.reply(reply)
    assert (episode.score(), episode.answered) == (0.0, False)


def test_the_run_seed_changes_the_order_of_training_alone() -> None:
    one, other = built(seed=1), built(seed=2)

    def asked(task: Any, split: Split, n: int) -> list[str]:
        context = Context(system="x", demonstrations=())
        turns = [episode.turn(context) for episode in task.episodes(split, 0, n)]
        return [turn.student_messages[0]["content"] for turn in turns]

    for split in ("validation", "test"):
        assert asked(one, split, 100) == asked(other, split, 100)
    assert asked(one, "train", 400) != asked(other, "train", 400)
    assert set(asked(one, "train", 400)) == set(asked(other, "train", 400))


@pytest.mark.parametrize("key", ["num_train", "num_validation", "num_test"])
@pytest.mark.parametrize("value", [0, 2001])
def test_a_bad_number_of_prompts_is_one_line(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^task\.{key}={value}; allowed: 1 to 2000$"):
        built(**{key: value})


def test_retention_can_ask_for_instructions() -> None:
    config = load_config(compose("train", ["retention=instructions"]))
    episodes = build_plug(config.retention).episodes("test", 0, 200)
    assert len(episodes) == 200
    assert config.evaluation.retention_max_new_tokens == 128  # the demo's 32 cut most answers
    with pytest.raises(UserError, match=r"^retention\.level=word; allowed: prompt, instruction$"):
        load_config(compose("train", ["retention=instructions", "retention.level=word"]))


def test_a_three_instruction_prompt_reads_as_one_text() -> None:
    prompt = InstructionPrompt(
        question=QUESTIONS[0],
        instructions=(
            Instruction(kind="no_comma", arguments={}),
            Instruction(kind="min_words", arguments={"n": 40}),
            Instruction(kind="repeat", arguments={"question": QUESTIONS[0]}),
        ),
    )
    assert prompt.text == (
        "Describe a rainy day in a small harbour town. Do not use any comma. Use at least 40 "
        'words. First repeat "Describe a rainy day in a small harbour town." word for word, then '
        "answer."
    )
