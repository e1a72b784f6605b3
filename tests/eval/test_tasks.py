"""Tasks: what is refused without lm-eval, how its figures are read, and, where it is installed, its own answers."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from planish.errors import PlanishError
from planish.eval import tasks
from planish.eval.tasks import evaluate

THERE = importlib.util.find_spec("lm_eval") is not None
YAML = """task: local_pets
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: right
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


class Nothing:
    """A model that mustn't be asked."""


@pytest.fixture
def pets(tmp_path):
    """A folder with a folder of one task, six questions."""
    rows = [{"question": f"Which pet {verb}?", "choices": ["the cat", "a dog", "fish"], "right": index % 3}
            for index, verb in enumerate(("purrs", "barks", "swims", "meows", "fetches", "is wet"))]  # fmt: skip
    (tmp_path / "data" / "yaml").mkdir(parents=True)
    (tmp_path / "data" / "pets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "yaml" / "pets.yaml").write_text(YAML.format(file=tmp_path / "data" / "pets.jsonl"))
    return tmp_path / "data", rows


def test_the_first_metric_is_the_one_to_quote():
    results = {"alias": "x", "perplexity,none": 50.0, "perplexity_stderr,none": "N/A", "acc,none": 0.5,
               "acc_stderr,none": 0.1, "sample_len": 40}  # fmt: skip
    assert list(tasks._metrics(results).items()) == [("acc", 0.5), ("stderr", 0.1), ("perplexity", 50.0)]
    two = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.02, "exact_match,loose": 0.5,
           "exact_match_stderr,loose": 0.03}  # fmt: skip
    assert tasks._metrics(two) == {"exact_match": 0.25, "stderr": 0.02, "exact_match (loose)": 0.5,
                                   "exact_match (loose)_stderr": 0.03}  # fmt: skip
    assert tasks._metrics({"alias": "x"}) == {}


def test_names_are_looked_up():
    assert tasks._known("piqa", ["piqa", "local_piqa"]) == "piqa"
    assert tasks._known("piqa", ["local_piqa"]) == "local_piqa"
    with pytest.raises(PlanishError, match="no task 'pica': did you mean 'piqa'"):
        tasks._known("pica", ["local_piqa"])


def test_refused_before_any_work(tmp_path):
    with pytest.raises(PlanishError, match="0 tasks, limit None, shots None: there is nothing"):
        evaluate(Nothing(), [])
    with pytest.raises(PlanishError, match="1 tasks, limit 0"):
        evaluate(Nothing(), ["piqa"], limit=0)
    with pytest.raises(PlanishError, match="no such folder: .*nowhere"):
        evaluate(Nothing(), ["piqa"], task_data=tmp_path / "nowhere")
    with pytest.raises(PlanishError, match="has 0 folders of lm-eval's YAML files"):
        evaluate(Nothing(), ["piqa"], task_data=tmp_path)


@pytest.mark.skipif(THERE, reason="lm-eval is installed")
def test_without_lm_eval_it_says_so(pets):
    with pytest.raises(PlanishError, match=r"tasks need lm-eval \(lm_eval is missing\); pip install planish\[eval\]"):
        evaluate(Nothing(), ["pets"], task_data=pets[0])


@pytest.mark.skipif(not THERE, reason="needs lm-eval")
@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_matches_the_plain_count(pets, tiny_llama):
    folder, rows = pets
    base = tiny_llama(initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = 0
    for row in rows:
        totals = []
        for choice in row["choices"]:
            context = tokenizer(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([context + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                chances = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            totals.append(float(chances[len(context) - 1 :].sum()))
        right += totals.index(max(totals)) == row["right"]
    counts: dict[str, int] = {}
    found = evaluate(model, ["pets"], task_data=folder, tokenizer=tokenizer, counts=counts)
    assert found["pets"]["acc"] == pytest.approx(right / 6) and found["pets"]["stderr"] > 0
    assert counts["rows"] == 18 and counts["tokens"] > 18 * 20
    more: dict[str, int] = {}
    evaluate(model, ["pets"], task_data=folder, tokenizer=tokenizer, shots=2, limit=3, counts=more)
    assert more["rows"] == 9 and more["tokens"] / 9 > 2 * counts["tokens"] / 18
    with pytest.raises(PlanishError, match="no task 'pest': did you mean 'pets'"):
        evaluate(model, ["pest"], task_data=folder, tokenizer=tokenizer)
