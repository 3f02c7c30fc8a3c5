"""The configs of studies: they parse, and their templates make the right texts of rows as their datasets have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mui_callback.demo import run as demo
from mui_callback.responses.extraction import extract, is_same
from mui_callback.responses.task import Task, read_task
from mui_callback.responses.task_config import TaskConfig
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.parser import parse_study

ROOT = Path(__file__).parents[1]
ROWS: Mapping[str, Any] = json.loads((Path(__file__).parent / "data" / "study_rows.json").read_text(encoding="utf-8"))
"""Rows of the splits that the tasks read, by dataset, subset and split: real ones, but for those with the id "made-…",
and for shorter tests of HumanEval."""
PLAIN, CHAT = ("olmoe", "deepseek_v2_lite"), ("qwen_moe", "gpt_oss")
TASKS = ("gsm8k", "math", "mmlu", "arc", "bbh_date_understanding", "bbh_object_counting", "bbh_boolean_expressions")
CODE = ("humaneval", "mbpp")


@cache
def study(name: str) -> StudyConfig:
    config, is_dry_run = parse_study([str(ROOT / "configs" / f"{name}.yaml")])
    assert not is_dry_run
    return config


def task_of(name: str, task: str) -> TaskConfig:
    (found,) = [one for one in study(name).tasks if one.name == task]
    return found


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All datasets as local folders, with subsets and splits as on the hub."""
    root = tmp_path_factory.mktemp("datasets")
    for dataset, subsets in ROWS.items():
        card = ["---", "configs:"]
        for subset, splits in subsets.items():
            card += [f"- config_name: {subset}", "  data_files:"]
            for split, rows in splits.items():
                file = root / dataset / subset / f"{split}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                card += [f"  - split: {split}", f"    path: {subset}/{split}.jsonl"]
        (root / dataset / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return root


def read(datasets: Path, name: str, task: str) -> Task:
    config = task_of(name, task)
    assert config.dataset in ROWS
    return read_task(replace(config, dataset=str(datasets / config.dataset)))


@pytest.mark.parametrize("name", [*PLAIN, *CHAT])
def test_a_study_of_the_hub_is_complete(name: str) -> None:
    config = study(name)
    assert [task.name for task in config.tasks] == [*TASKS, *CODE]
    assert config.response == "generate"
    assert config.probe.rules == ("top_fraction=0.001",)
    assert config.keep_checkpoints == 0
    assert all(model.chat is (name in CHAT) for model in config.models)
    assert not any(model.trust_remote_code or model.allow_pickle for model in config.models)
    for task in config.tasks:
        assert task.few_shot == 0 if name in CHAT else task.stop
        assert task.max_new_tokens >= (2048 if name in CHAT else 128)


def test_the_models_are_those_of_the_hub() -> None:
    (olmoe,) = study("olmoe").models
    assert olmoe.source == "allenai/OLMoE-1B-7B-0924"
    assert olmoe.checkpoints == [
        "step120000-tokens503B",
        "step240000-tokens1006B",
        "step480000-tokens*B",
        "step715000-tokens*B",
        "step955000-tokens*B",
        "step1200000-tokens5033B",
        "main",
    ]
    assert {name: [model.source for model in study(name).models] for name in (PLAIN[1], *CHAT)} == {
        "deepseek_v2_lite": ["deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-Coder-V2-Lite-Base"],
        "qwen_moe": [
            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
            "Qwen/Qwen2-57B-A14B-Instruct",
            "Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        ],
        "gpt_oss": ["openai/gpt-oss-20b"],
    }


@pytest.mark.parametrize(("one", "other"), [PLAIN, CHAT])
def test_studies_ask_the_same(one: str, other: str) -> None:
    assert study(one).tasks == study(other).tasks


@dataclass(frozen=True)
class Expected:
    """Of one row of a task."""

    prompt: str
    """The end of the prompt, from the last example on."""
    response: str
    answer: str | None
    choices: tuple[str, ...] = ()
    right: int | None = None
    row: int = 0


PLANET = (
    "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most likely effect of "
    "this increase in rotation?"
)
PLANETARY = ("density will decrease.", "years will become longer.", "days will become shorter.")
ARCHES = ("The first", "The first and second", "The second", "The second and third")
DUCKS = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "  # noqa: RUF001
    "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How "
    "much in dollars does she make every day at the farmers' market?"
)
DUCKS_ANSWER = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day at the "
    "farmer’s market.\n#### 18"  # noqa: RUF001
)
FRACTIONS = (
    r"If $f(x) = \frac{3x-2}{x-2}$, what is the value of $f(-2) +f(-1)+f(0)$? Express your answer as a common fraction."
)
FRACTIONS_ANSWER = (
    r"$f(-2)+f(-1)+f(0)=\frac{3(-2)-2}{-2-2}+\frac{3(-1)-2}{-1-2}+\frac{3(0)-2}{0-2}=\frac{-8}{-4}+\frac{-5}{-3}"
    r"+\frac{-2}{-2}=2+\frac{5}{3}+1=\boxed{\frac{14}{3}}$"
)
TOMORROW = (
    "Today is Christmas Eve of 1937. What is the date tomorrow in MM/DD/YYYY?\nOptions:\n(A) 12/11/1937\n"
    "(B) 12/25/1937\n(C) 01/04/1938\n(D) 12/04/1937\n(E) 12/25/2006\n(F) 07/25/1937"
)
INSTRUMENTS = (
    "I have a flute, a piano, a trombone, four stoves, a violin, an accordion, a clarinet, a drum, two lamps, and a "
    "trumpet. How many musical instruments do I have?"
)
STRLEN = '''

def strlen(string: str) -> int:
    """ Return length of given string
    >>> strlen('')
    0
    >>> strlen('abc')
    3
    """
'''
OCCURRENCE = "Write a python function to remove first and last occurrence of a given character from the string."
OCCURRENCE_TESTS = """assert remove_Occ("hello","l") == "heo"
assert remove_Occ("abcda","a") == "bcd"
assert remove_Occ("PHP","P") == "H\""""
OCCURRENCE_CODE = (
    "def remove_Occ(s,ch): \n    for i in range(len(s)): \n        if (s[i] == ch): \n"
    "            s = s[0 : i] + s[i + 1:] \n            break\n    for i in range(len(s) - 1,-1,-1):  \n"
    "        if (s[i] == ch): \n            s = s[0 : i] + s[i + 1:] \n            break\n    return s "
)

IN_PLAIN_TEXT = {
    "gsm8k": Expected(
        "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How "
        "many clips did Natalia sell altogether in April and May?\nAnswer: Natalia sold 48/2 = <<48/2=24>>24 clips in "
        "May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72\n\n"
        f"Question: {DUCKS}\nAnswer:",
        f" {DUCKS_ANSWER}",
        "18",
    ),
    "math": Expected(
        "Problem: What is the sum of the first five positive odd integers?\nSolution: The sum of the first $n$ "
        f"positive odd integers is $n^2$. For $n = 5$ it is $\\boxed{{25}}$.\n\nProblem: {FRACTIONS}\nSolution:",
        f" {FRACTIONS_ANSWER}",
        r"\frac{14}{3}",
        row=1,
    ),
    "mmlu": Expected(
        "Question: The cyclic subgroup of Z_24 generated by 18 has order\nA. 4\nB. 8\nC. 12\nD. 6\nAnswer: 4\n\n"
        "Question: What is the embryological origin of the hyoid bone?\nA. The first pharyngeal arch\n"
        "B. The first and second pharyngeal arches\nC. The second pharyngeal arch\n"
        "D. The second and third pharyngeal arches\nAnswer:",
        " The second and third pharyngeal arches",
        "D",
        tuple(f" {arch} pharyngeal arch{'es' if 'and' in arch else ''}" for arch in ARCHES),
        3,
        row=1,
    ),
    "arc": Expected(
        "Question: George wants to warm his hands quickly by rubbing them. Which skin surface will produce the most "
        "heat?\nA. dry palms\nB. wet palms\nC. palms covered with oil\nD. palms covered with lotion\nAnswer: dry palms"
        f"\n\nQuestion: {PLANET}\nA. Planetary density will decrease.\nB. Planetary years will become longer.\n"
        "C. Planetary days will become shorter.\nD. Planetary gravity will become stronger.\nAnswer:",
        " Planetary days will become shorter.",
        "C",
        (*(f" Planetary {what}" for what in PLANETARY), " Planetary gravity will become stronger."),
        2,
    ),
    "bbh_date_understanding": Expected(
        "Q: Today is May 3, 2012. What is the date tomorrow in MM/DD/YYYY?\nOptions:\n(A) 05/02/2012\n(B) 05/04/2012\n"
        "(C) 03/05/2012\nA: Let's think step by step. Today is May 3, 2012, so that tomorrow is May 4, 2012, which is "
        f"05/04/2012. So the answer is (B).\n\nQ: {TOMORROW}\nA: Let's think step by step.",
        " So the answer is (B).",
        "(B)",
    ),
    "bbh_object_counting": Expected(
        "Q: I have two apples, a chair, and three bananas. How many fruits do I have?\nA: Let's think step by step. "
        "There are 2 apples and 3 bananas, and a chair is no fruit. 2 + 3 = 5. So the answer is 5.\n\n"
        f"Q: {INSTRUMENTS}\nA: Let's think step by step.",
        " So the answer is 8.",
        "8",
    ),
    "bbh_boolean_expressions": Expected(
        "Q: True and not ( False or True ) is\nA: Let's think step by step. ( False or True ) is True, and not True is "
        "False. True and False is False. So the answer is False.\n\nQ: not ( True ) and ( True ) is\n"
        "A: Let's think step by step.",
        " So the answer is False.",
        "False",
    ),
    "humaneval": Expected(STRLEN, "    return len(string)\n", None),
    "mbpp": Expected(
        "You are an expert Python programmer, and here is your task: Write a python function to identify non-prime "
        "numbers. Your code should pass these tests:\n\nassert is_not_prime(2) == False\nassert is_not_prime(10) == "
        "True\nassert is_not_prime(35) == True\n[BEGIN]\nimport math\ndef is_not_prime(n):\n    result = False\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\n        if n % i == 0:\n            result = True\n"
        f"    return result\n[DONE]\n\nYou are an expert Python programmer, and here is your task: {OCCURRENCE} "
        f"Your code should pass these tests:\n\n{OCCURRENCE_TESTS}\n[BEGIN]\n",
        OCCURRENCE_CODE,
        None,
    ),
}
IN_CONVERSATION = {
    "gsm8k": Expected(
        f"{DUCKS}\n\nThink step by step. End with #### and the number.",
        DUCKS_ANSWER,
        "18",
    ),
    "math": Expected(
        f"{FRACTIONS}\n\nThink step by step. Put the final answer in \\boxed{{}}.",
        FRACTIONS_ANSWER,
        r"\frac{14}{3}",
        row=1,
    ),
    "mmlu": Expected(
        "What is the embryological origin of the hyoid bone?\n(A) The first pharyngeal arch\n"
        "(B) The first and second pharyngeal arches\n(C) The second pharyngeal arch\n"
        "(D) The second and third pharyngeal arches\n\nEnd with: The answer is (X).",
        "The answer is (D).",
        "D",
        ("(A)", "(B)", "(C)", "(D)"),
        3,
        row=1,
    ),
    "arc": Expected(
        "Which of these is a gas at room temperature?\n(A) iron\n(B) oxygen\n(C) water\n\nEnd with: The answer is (X).",
        "The answer is (B).",
        "B",
        ("(A)", "(B)", "(C)"),
        1,
        row=1,
    ),
    "bbh_date_understanding": Expected(
        f"{TOMORROW}\n\nThink step by step. End with: So the answer is ...", "So the answer is (B).", "(B)"
    ),
    "bbh_object_counting": Expected(
        f"{INSTRUMENTS}\n\nThink step by step. End with: So the answer is ...", "So the answer is 8.", "8"
    ),
    "bbh_boolean_expressions": Expected(
        "not ( True ) and ( True ) is\n\nThink step by step. End with: So the answer is ...",
        "So the answer is False.",
        "False",
    ),
    "humaneval": Expected(
        f"Complete this function. Answer with the whole function in one block of code.\n\n```python\n{STRLEN}```",
        f"```python\n{STRLEN}    return len(string)\n```",
        None,
    ),
    "mbpp": Expected(
        f"{OCCURRENCE} Answer with one block of Python code, which should pass these tests:\n\n{OCCURRENCE_TESTS}",
        f"```python\n{OCCURRENCE_CODE}\n```",
        None,
    ),
}


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        (name, task, expected)
        for name, texts in ((PLAIN[0], IN_PLAIN_TEXT), (CHAT[0], IN_CONVERSATION))
        for task, expected in texts.items()
    ],
)
def test_templates_make_the_texts_of_a_row(datasets: Path, name: str, task: str, expected: Expected) -> None:
    found = read(datasets, name, task)
    sample = found.samples[expected.row]
    # With several examples, the last of them and the question.
    before = sample.prompt.removesuffix(expected.prompt)
    assert before + expected.prompt == sample.prompt
    assert (before == "") == (found.config.few_shot <= 1)
    assert before.count("[DONE]") == max(found.config.few_shot - 1, 0)
    assert sample.response == expected.response
    assert sample.choices == expected.choices
    assert sample.answer == expected.right
    assert found.answers[expected.row] == expected.answer


@pytest.mark.parametrize("name", [PLAIN[0], CHAT[0]])
@pytest.mark.parametrize("task", TASKS)
def test_the_gold_answer_is_found_in_the_gold_response(datasets: Path, name: str, task: str) -> None:
    found = read(datasets, name, task)
    for sample, answer in zip(found.samples, found.answers, strict=True):
        said = extract(found.config.extract, sample.response, sample.choices)
        assert said is not None
        assert answer is not None
        assert is_same(said, answer)


@pytest.mark.parametrize(
    ("name", "task", "text", "said"),
    [
        ("olmoe", "gsm8k", " She sells 9, so it is 9 * 2 = $18.\n#### 18", "18"),
        ("olmoe", "math", r" Twice: $\boxed{7}$, no, $\boxed{\frac{\sqrt{2}}{2}}$.", r"\frac{\sqrt{2}}{2}"),
        ("olmoe", "mmlu", " D", "D"),
        ("olmoe", "arc", " C. Planetary days will become shorter.", "C"),
        ("olmoe", "bbh_date_understanding", " It is 12/25/1937. So the answer is (B) 12/25/1937.", "(B)"),
        ("qwen_moe", "bbh_boolean_expressions", "<think>\n</think>\n\nSo the answer is **False**.", "False"),
        (
            "gpt_oss",
            "math",
            r"End with \boxed{}. <|end|>final<|message|>It is $\boxed{\frac{14}{3}}$.",
            r"\frac{14}{3}",
        ),
        ("gpt_oss", "mmlu", "analysis<|message|>Not (A).<|end|>final<|message|>The answer is **(D)**.", "D"),
    ],
)
def test_answers_as_models_give_them(datasets: Path, name: str, task: str, text: str, said: str) -> None:
    found = read(datasets, name, task)
    assert extract(found.config.extract, text, found.samples[-1].choices or found.samples[0].choices) == said


def test_the_tiny_study_is_of_what_the_demo_leaves() -> None:
    config = study("tiny")
    (model,) = config.models
    assert Path(model.source) == demo.DEFAULT_OUTPUT / demo.CHECKPOINTS_NAME
    assert config.probe.rules == (f"top_fraction={demo._TOP_FRACTION}",)
    assert model.tokens_per_step == demo._ROWS_A_STEP * demo._ROW_LENGTH
    assert [task.file for task in config.tasks] == [
        demo.DEFAULT_OUTPUT / demo.HELD_OUT_NAME / f"{name}.jsonl" for name in demo._SHARES
    ]
    assert config.output == demo.DEFAULT_OUTPUT / "trajectory"
