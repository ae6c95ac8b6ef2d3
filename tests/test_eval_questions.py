"""GenEval 2, DPG-Bench and VBench: benchmark numbers from given answers."""

import json

import pytest

from diffdistill.eval import questions
from diffdistill.eval.questions import Question

RECORDS = [
    {"prompt": "a pig", "atom_count": 3, "skills": ["object", "count"]},
    {"prompt": "two green pigs", "atom_count": 4, "skills": ["object", "attribute", "count"]},
]


def test_soft_tifa_is_the_mean_of_prompt_means():
    found = questions.soft_tifa(RECORDS, [[1.0, 0.25], [1.0, 1.0, 0.0]], judge="vqa:1")
    assert found["am"] == pytest.approx(100 * (0.625 + 2 / 3) / 2)
    assert found["gm"] == pytest.approx(100 * (0.5 + 0) / 2)
    assert found["skills"] == {"attribute": 100, "count": 12.5, "object": 100}
    assert found["atom_counts"] == {3: 50, 4: 0}
    assert (found["protocol"], found["judge"], found["n"]) == ("geneval2/n=2", "vqa:1", 2)
    wrong = 100 * (1 + 0.25 + 1 + 1 + 0) / 5  # mean over all atoms
    assert abs(found["am"] - wrong) > 0.3


def test_geneval2_is_the_protocol_of_all_800_prompts():
    assert questions.soft_tifa(RECORDS[:1] * 800, [[1, 1]] * 800, judge="x")["protocol"] == (
        "geneval2"
    )


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([[1.0, 1.0]], "1 lists of scores for 2 prompts"),
        ([[1.0], [1.0, 1.0, 1.0]], "1 scores for 2 questions"),
        ([[1.0, 1.5], [1.0, 1.0, 1.0]], "not all in"),
        ([[1.0, float("nan")], [1.0, 1.0, 1.0]], "not all in"),
    ],
)
def test_wrong_scores_are_refused(scores, says):
    with pytest.raises(ValueError, match=says):
        questions.soft_tifa(RECORDS, scores, judge="x")


def test_accepted_answers():
    assert set(questions.accepted_answers("Is the pig green?", "Yes")) == {
        "Yes", "yes", " Yes", " yes",
    }  # fmt: skip
    assert set(questions.accepted_answers("How many pigs are in the image?", "three")) == {
        "three", "Three", "3", " three", " Three", " 3",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'many'"):
        questions.accepted_answers("How many pigs?", "many")


def test_geneval2_data_come_from_a_path(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    with pytest.raises(ValueError, match=r"is missing: .*facebookresearch/GenEval2"):
        questions.read_geneval2(path)
    record = {
        "prompt": "a pig", "atom_count": 1, "vqa_list": [["Is it a pig?", "Yes"]],
        "skills": ["object"],
    }  # fmt: skip
    path.write_text(json.dumps(record) + "\n")
    assert questions.read_geneval2(path) == [record]
    for other in ("{", json.dumps(record | {"skills": []}), "", json.dumps({"skills": []})):
        path.write_text(other)
        with pytest.raises(ValueError, match="not GenEval 2's data"):
            questions.read_geneval2(path)


ASKED = [
    Question(1, "Is there a car?", "entity - whole", ()),
    Question(2, "Is the car red?", "attribute - color", (1,)),
    Question(3, "Is the red shiny?", "attribute - texture", (2,)),
    Question(4, "Is it night?", "global - time", ()),
]


def test_dpg_children_of_a_no_score_nothing_but_count_in_their_category():
    answers = {"a": [{1: "no", 2: "yes", 3: "yes", 4: "yes"}]}
    found = questions.dpg({"a": ASKED}, answers, judge="vqa")
    assert found["score"] == 100 * 1 / 4  # 2 by its parent, 3 by the zero of 2
    assert found["categories"] == {"attribute": 100, "entity": 0, "global": 100}
    assert found["details"]["attribute - color"] == 100
    wrong = 100 * 3 / 4  # without parents
    assert found["score"] != wrong


def test_dpg_means_over_images_then_prompts_and_counts_failures():
    yes, no = dict.fromkeys(range(1, 5), "yes"), dict.fromkeys(range(1, 5), "No, it isn't")
    asked = {"a": ASKED, "b": ASKED, "c": ASKED, "d": ASKED, "e": [Question(1, "", "x", (9,))]}
    answers = {
        "a": [{str(k): v for k, v in yes.items()}] * 3 + [no], "b": [yes], "c": [{1: "yes"}],
        "e": [{1: "yes"}],
    }  # fmt: skip
    found = questions.dpg(asked, answers, judge="vqa")
    assert found["score"] == pytest.approx(100 * (0.75 + 1) / 2)
    assert found["failed"] == {
        "c": "no answer to question 2", "d": "no answers",
        "e": "question 1 has a parent that is not asked",
    }  # fmt: skip
    assert (found["n"], found["images"], found["protocol"]) == (2, 5, "dpg/n=2x1-4")
    assert found["categories"]["entity"] == pytest.approx(100 * 4 / 5)
    with pytest.raises(ValueError, match="no prompt of the data"):
        questions.dpg(asked, {"z": [yes]}, judge="vqa")
    with pytest.raises(ValueError, match="no prompt has answers"):
        questions.dpg(asked, {}, judge="vqa")


@pytest.mark.parametrize(
    ("prompts", "images", "protocol"),
    [(1065, 4, "dpg"), (1064, 4, "dpg/n=1064"), (1065, 1, "dpg/n=1065x1"), (2, 9, "dpg/n=2x9")],
)
def test_dpg_is_the_protocol_of_four_images_of_all_prompts(prompts, images, protocol):
    asked = {str(i): ASKED[:1] for i in range(prompts)}
    found = questions.dpg(asked, {k: [{1: "yes"}] * images for k in asked}, judge="vqa")
    assert (found["protocol"], found["images"]) == (protocol, prompts * images)


HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)


def test_dpg_questions_from_the_file(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    rows = [
        'a,"A red car, at night",,1,0,entity,whole,entity - whole (car),Is there a car?',
        ',,,,,,,,',
        'a,"A red car, at night",,2,"1, 0",attribute,color,"attribute - color (car, red)",Red?',
    ]  # fmt: skip
    path.write_text(HEAD + "\n".join([rows[0], rows[2]]))
    found = questions.read_dpg(path)
    assert found == {
        "a": [
            Question(1, "Is there a car?", "entity - whole", ()),
            Question(2, "Red?", "attribute - color", (1,)),
        ]
    }
    path.write_text(HEAD + HEAD + "\n".join([rows[0], rows[2]]))
    assert questions.read_dpg(path) == found
    for text in (HEAD, "a,b\n1,2\n3,4", HEAD + "\n".join(rows)):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"no questions|not dpg_bench"):
            questions.read_dpg(path)
    with pytest.raises(ValueError, match=r"is missing: DPG-Bench's"):
        questions.read_dpg(tmp_path / "none.csv")


def at(*, quality, semantic):
    names = list(questions.VBENCH)
    ends = {d: questions.VBENCH[d][:2] for d in names}
    share = dict.fromkeys(names[:7], quality) | dict.fromkeys(names[7:], semantic)
    return {d: low + share[d] * (high - low) for d, (low, high) in ends.items()}


def test_18_vbench_total():
    best = questions.vbench(at(quality=1, semantic=1))
    assert best["total"] == pytest.approx(1.0)
    assert list(best["dimensions"].values()) == pytest.approx([1.0] * 16)
    assert questions.vbench(at(quality=1, semantic=0))["total"] == pytest.approx(0.8)
    wrong = sum(at(quality=1, semantic=0).values()) / 16  # neither normalised nor weighted
    assert abs(wrong - 0.8) > 0.1


def test_vbench_dynamic_degree_counts_half():
    scores = at(quality=1, semantic=1) | {"dynamic degree": 0.0}
    found = questions.vbench(scores)
    assert found["quality"] == pytest.approx(6 / 6.5) and found["semantic"] == pytest.approx(1)
    names = [d for d, (_, _, weight) in questions.VBENCH.items() if weight != 1]
    assert names == ["dynamic degree"] and len(questions.VBENCH) == 16


def test_vbench_results_are_read_and_must_be_complete(tmp_path):
    scores = at(quality=0.5, semantic=0.25)
    for i, part in enumerate((list(scores)[:9], list(scores)[9:])):
        table = {d.replace(" ", "_"): [scores[d], [{"video_path": "x"}]] for d in part}
        (tmp_path / f"{i}.json").write_text(json.dumps(table))
    read = questions.read_vbench([tmp_path / "0.json", tmp_path / "1.json"])
    found = questions.vbench(read)
    assert found["quality"] == pytest.approx(0.5) and found["total"] == pytest.approx(0.45)
    with pytest.raises(ValueError, match=r"Missing: scene.*overall consistency; unknown: scenes"):
        questions.vbench({k: v for k, v in list(read.items())[:12]} | {"scenes": 1.0})
    (tmp_path / "0.json").write_text('{"scene": 3}')
    with pytest.raises(ValueError, match="no result of VBench"):
        questions.read_vbench([tmp_path / "0.json"])
