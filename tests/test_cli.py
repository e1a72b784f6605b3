"""The command line: every verb on a tiny model, and every refusal in one line with exit status 2."""

import json
import subprocess
import sys
import types

import pytest

from planish import cli
from planish.cli import make, show
from planish.errors import PlanishError
from planish.log import Event

QUICK = ("--samples", "4", "--seqlen", "16", "--device", "cpu", "--scheme", "w4g32")


@pytest.fixture
def planish(monkeypatch, capsys):
    """planish("quantize", ...) -> (exit status, stdout, stderr), in this process."""

    def run(*words) -> types.SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["planish", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()  # what making the model printed
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(status=stop.value.code, out=out, err=err)

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A smith planishes a sheet of metal with many light blows. " * 40)
    return path


def test_from_a_model_to_an_answer(planish, tiny_llama, tmp_path, text):
    model, out = tiny_llama(), tmp_path / "out" / "q4"
    made = planish(
        "quantize",
        model,
        "steps=2",
        "--out",
        out,
        "--data",
        text,
        *QUICK,
        "--ignore",
        "layers.0.*o_proj",
        "--layers",
        "down_proj=w8g64",
    )
    assert made.status == 0, made.err
    assert "13 of 14 linears" in made.out and "bits a weight with embeddings" in made.out
    assert "planish   2/2   loss " in made.out and " left   peak " in made.out and "end_to_end" in made.out
    assert f"wrote {out}" in made.out
    shown = planish("info", out)
    assert shown.status == 0, shown.err
    assert "13 of 14 linears quantized" in shown.out and "made by planish steps=2 from" in shown.out
    assert "model.layers.*.mlp.down_proj" in shown.out and "w8g64" in shown.out and "16-bit" in shown.out
    assert "model.layers.1.mlp.up_proj" in planish("info", out, "--linears").out
    measured = planish("eval", out, "--ppl", text, "--seqlen", "32", "--limit", "2", "--device", "cpu")
    assert measured.status == 0, measured.err
    assert measured.out.startswith("perplexity ") and "the first 2" in measured.out
    said = planish("generate", out, "A smith", "--tokens", "3", "--device", "cpu")
    assert said.status == 0 and said.out


def test_quantize_inexactly(planish, tiny_llama, tmp_path):
    how = ("--recipe", "rtn", "--scheme", "w4g32asym", "--format", "gptq", "--device", "cpu")
    words = ("quantize", tiny_llama(), *how)
    refused = planish(*words, "--out", tmp_path / "q4")
    assert refused.status == 2 and "may have the zero point 0, which gptq lacks" in refused.err
    made = planish(*words, "--inexact", "--out", tmp_path / "q4")
    assert made.status == 0, made.err
    assert "gptq can't take 14 linears so: rounded once more in the end" in made.out
    assert "14 layers were rounded once more: " in made.out and "14 of 14" in planish("info", tmp_path / "q4").out


def test_bench(planish, tiny_llama, tmp_path):
    figures = tmp_path / "bench.json"
    words = ("--batch", "1,2", "--prompt", "4", "--new", "3", "--device", "cpu", "--json", figures)
    shown = planish("bench", tiny_llama(), *words)
    assert shown.status == 0, shown.err
    assert "tokens/s" in shown.out and "GB/s measured" in shown.out and "q_proj" in shown.out
    assert [speed["batch"] for speed in json.loads(figures.read_text())["speeds"]] == [1, 2]
    refused = planish("bench", tiny_llama(), "--batch", "1,x", "--device", "cpu")
    assert refused.err == "planish: --batch '1,x' isn't a list of counts; write it as 1,8,32\n" and refused.status == 2


def test_info_of_a_model_that_is_not_quantized(planish, tiny_llama):
    shown = planish("info", tiny_llama())
    assert shown.status == 0, shown.err
    assert "bits a weight with embeddings" in shown.out and "model.layers.*.self_attn.q_proj" in shown.out


def test_a_recipe_of_the_users_own(planish, tiny_llama, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from planish.recipes.rtn import rtn\n\ndef mine(*, search: bool = False):\n    return rtn(search=search)\n"
    )
    out = tmp_path / "out"
    made = planish("quantize", tiny_llama(), "--recipe", f"{mine}:mine", "--out", out, *QUICK)
    assert made.status == 0, made.err
    assert json.loads((out / "run.json").read_text())["recipe"] == "rtn"


def test_fewer_windows_are_said(planish, tiny_llama, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x" * 100)
    made = planish(
        "quantize", tiny_llama(), "steps=1", "--out", tmp_path / "q", "--data", short, *QUICK, "--samples", "50"
    )
    assert made.status == 0, made.err
    assert "short.txt holds 6 windows of 16 tokens, not 50: using 6" in made.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "signrond"), "no recipe 'signrond': did you mean 'signround'?"),
        (("stepps=3",), "recipe 'planish' has no key 'stepps': did you mean 'steps'?"),
        (("steps=many",), "steps='many' isn't a number"),
        (("steps",), "'steps' isn't KEY=VALUE; write a recipe's key as steps=100"),
        (("samples=3",), "'samples=3': samples is an option; write --samples 3"),
        (("--preset", "fats"), "recipe 'planish' has no preset 'fats': did you mean 'fast'?"),
        (("--scheme", "w5g7x"), "no scheme 'w5g7x'; write it as w4g128, w2g64asym, w3pc or W4A16"),
        (("--scheme", "w4", "--bits", "4"), "--scheme w4 and --bits 4 say the same thing twice; give one"),
        (("--bits", "5"), "5 bits aren't supported; use one of 2, 3, 4, 6, 8"),
        (("--bits", "1.5"), "no average of 1.5 bits; ask for 2 to 8"),
        (("--bits", "two"), "--bits two; give a width such as 3, or an average such as 2.5"),
        (("--scheme", "w4g256"), "group size 256 is larger than its 64 inputs"),
        (("--format", "gguff"), "no format 'gguff'"),
        (("--layers", "nothing=w4g32"), "'nothing' matches none of the 14 linears"),
        (("--ignore", "proj", "--scheme", "w4g32"), "no linear is left to quantize; relax --ignore"),
        (("--data", "missing.txt", "--scheme", "w4g32"), "no such file: missing.txt"),
        (("--device", "gpu", "--scheme", "w4g32"), "no device 'gpu'; use cpu, cuda or cuda:1"),
    ],
)
def test_refusals(planish, tiny_llama, tmp_path, words, message):
    out = tmp_path / "q"
    refused = planish("quantize", tiny_llama(), "--out", out, *words)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith("planish: ") and message in refused.err and refused.err.count("\n") == 1
    assert not out.exists()


def test_refusals_of_folders(planish, tiny_llama, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for words, message in [
        (("quantize", tmp_path / "nowhere", "--out", tmp_path / "q"), "nowhere"),
        (("quantize", full, "--out", tmp_path / "q"), "config.json"),
        (("quantize", tiny_llama(), "--out", full), "isn't empty; choose another folder, or --overwrite"),
        (("quantize", tiny_llama()), "where to? give a new folder with --out DIR"),
        (("info", full), "config.json"),
        (("eval", tmp_path / "nowhere"), "nowhere"),
        (("eval", full, "--protocol", "gtpq"), "no protocol 'gtpq': there is gptq; without one no BOS is added"),
        (("eval", full, "--protocol", "gptq", "--limit", "2"), "measures the whole text; drop --limit"),
        (("generate", tmp_path / "nowhere", "hello"), "nowhere"),
    ]:
        refused = planish(*words)
        assert refused.status == 2 and message in refused.err, (words, refused)
        assert refused.err.count("\n") == 1 and refused.out == ""
    assert [file.name for file in full.iterdir()] == ["notes.txt"]


def test_a_folder_without_a_tokenizer(planish, tiny_llama):
    folder = tiny_llama()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused = planish("generate", folder, "hello", "--device", "cpu")
    assert refused.status == 2 and "has no tokenizer; copy the tokenizer files" in refused.err
    refused = planish("eval", folder, "--device", "cpu")
    assert refused.status == 2 and "no tokenizer in" in refused.err


def test_bits_are_short_for_a_scheme():
    assert [make._scheme(None, bits) for bits in (None, "2", "3", "4", "8", "2.5", "3.0")] == [
        "w4g128",
        "w2g64",
        "w3g128",
        "w4g128",
        "w8g128",
        "w2.5g64",
        "w3.0g128",
    ]
    assert [make._scheme(None, bits, "llama.cpp") for bits in ("2", "3", "4")] == ["w2g64", "w3g16k", "w4g128"]
    assert make._scheme("w3g32asym", None) == "w3g32asym"
    with pytest.raises(PlanishError):
        make._scheme("w4", "4")


def test_recipes_are_listed_and_explained(planish):
    listed = planish("recipes")
    assert listed.status == 0 and "signround" in listed.out and "rtn" in listed.out
    one = planish("recipes", "signround")
    assert "Q = clamp(" in one.out and "steps" in one.out and "200" in one.out and "fast" in one.out
    assert planish("recipes", "signrund").err == "planish: no recipe 'signrund': did you mean 'signround'?\n"


@pytest.mark.parametrize("verb", ["quantize", "finetune", "recipes", "eval", "generate", "bench", "info"])
def test_help_teaches_by_examples(planish, verb):
    shown = planish(verb, "--help")
    assert shown.status == 0 and f"planish {verb} " in shown.out.split("Options")[0].replace("Usage:", "")


def finetuned(planish, model, out, text, *words):
    return planish(
        "finetune", model, "--out", out, "--data", text, "--samples", "8", "--seqlen", "16", "--device", "cpu", *words
    )


def test_finetune_of_a_quantized_folder(planish, tiny_llama, tmp_path, text):
    model, q, out = tiny_llama(), tmp_path / "q", tmp_path / "tuned"
    assert planish("quantize", model, "--recipe", "rtn", "--scheme", "w2g32", "--out", q, "--device", "cpu").status == 0
    made = finetuned(planish, q, out, text, "--steps", "3", "distill=0.5", "batch_size=4", "--batch-size", "2")
    assert made.status == 0, made.err
    assert "the teacher's activations" in made.out and "e2e_qp   3/3   loss " in made.out and f"wrote {out}" in made.out
    run = json.loads((out / "run.json").read_text())
    assert run["keys"] == {"steps": 3, "distill": "0.5", "batch_size": "4"} and run["recipe"] == "e2e_qp"
    assert f"made by e2e_qp steps=3 distill=0.5 batch_size=4 from {q}" in planish("info", out).out
    assert planish("eval", out, "--ppl", text, "--seqlen", "32", "--limit", "2", "--device", "cpu").status == 0


def test_finetune_of_a_float_model(planish, tiny_llama, tmp_path, text):
    out = tmp_path / "q"
    # --epochs are those of the whole-model stage; the blocks' are a key
    made = finetuned(
        planish, tiny_llama(), out, text, "--recipe", "efficientqat", "--scheme", "w2g32", "--epochs", "1", "epochs=2",
        "--calib", "embedded",
    )  # fmt: skip
    assert made.status == 0, made.err
    assert "block_ap   2/2   loss " in made.out and "e2e_qp   1/1   loss " in made.out
    run = json.loads((out / "run.json").read_text())
    assert run["keys"] == {"e2e_epochs": 1.0, "epochs": "2"} and run["calibration"] == "embedded"


def test_refusals_of_finetune(planish, tiny_llama, tmp_path, text):
    model, q, out = tiny_llama(), tmp_path / "q", tmp_path / "tuned"
    assert planish("quantize", model, "--recipe", "rtn", "--scheme", "w2g32", "--out", q, "--device", "cpu").status == 0
    for given, words, message in [
        (model, (), "recipe 'e2e_qp' trains a model that is quantized already, and this one isn't; quantize it first"),
        (q, ("rate=0",), "the learning rate of scale is 0.0; it must be above 0"),
        (q, ("--steps", "0"), "must be 1 or more"),
        (q, ("steps=3",), "'steps=3': steps is an option; write --steps 3"),
        (q, ("--recipe", "rtn"), "recipe 'rtn' trains no whole model; use planish quantize --recipe rtn"),
        (q, ("--scheme", "w4g32"), "is quantized already; drop the scheme"),
        (q, ("--format", "gptq"), "is in format auto_round and stays so; drop --format"),
        (q, ("--track", "comet"), "no tracker 'comet'; use one of none, tensorboard, wandb"),
        (q, ("--seqlen", "300"), "seqlen 300 is above the model's max_position_embeddings"),
        (q, ("distill=1", "--teacher", tmp_path / "nowhere"), "no such folder: "),
        (tmp_path / "nowhere", (), "no such folder: "),
    ]:
        refused = finetuned(planish, given, out, text, *words)
        assert (refused.status, refused.out) == (2, ""), (words, refused)
        assert refused.err.startswith("planish: ") and message in refused.err and refused.err.count("\n") == 1, refused
    assert planish("finetune", q).err == "planish: where to? give a new folder with --out DIR\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["q", "text.txt", "tiny"]


def test_help_of_finetune_has_a_command_for_each_way(planish):
    shown = planish("finetune", "--help").out
    for words in (
        "planish finetune q2 --data chats.jsonl --out q2-tuned",
        "distill=1",
        "--recipe efficientqat",
        "--save-every 100 --resume",
        "--teacher",
        "--lean",
    ):
        assert words in shown


def test_an_unknown_option_is_a_usage_error(planish):
    assert planish("quantize", "m", "--stepps", "3").status == 2


def test_events(capsys):
    fitted = {"before": 0.0123, "after": 0.00456, "eta": 3725.0, "peak_bytes": 3 * 2**30}
    show.show_event(Event(stage="signround", index=3, total=30, **fitted))
    show.show_event(Event(stage="rtn", index=1, total=2, eta=61.0, note="the rate was halved"))
    show.show_event(Event(stage="data", index=0, total=30, note="using 3"))
    assert capsys.readouterr().out.splitlines() == [
        "signround   3/30   loss 1.230e-02 -> 4.560e-03   1:02:05 left   peak 3.00 GiB",
        "    the rate was halved",
        "rtn   1/2   1:01 left",
        "    using 3",
    ]


def test_module_and_command_are_one():
    shown = subprocess.run([sys.executable, "-m", "planish", "recipes", "signrond"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "planish: no recipe 'signrond': did you mean 'signround'?\n"


def test_export_measure_and_report(planish, tiny_llama, tmp_path, text):
    q4, out, page = tmp_path / "q4", tmp_path / "gptq", tmp_path / "page.html"
    assert planish("quantize", tiny_llama(), "--recipe", "rtn", "--out", q4, "--scheme", "w4g32").status == 0
    measured = planish("eval", q4, "--ppl", text, "--seqlen", "32", "--limit", "2", "--device", "cpu")
    assert (
        measured.status == 0 and f"| perplexity | `{text.name}`, windows of 32 tokens" in (q4 / "README.md").read_text()
    )
    made = planish("export", q4, "--format", "gptq", "--out", out)
    assert made.status == 0 and f"wrote {out}" in made.out, made.err
    assert json.loads((out / "eval.json").read_text()) == json.loads((q4 / "eval.json").read_text())
    shown = planish("report", q4, out, "--out", page)
    assert shown.status == 0 and text.name in page.read_text(), shown.err
    assert "loads in Planish, vllm, sglang, transformers" in planish("info", out).out


def test_a_card_that_somebody_changed_is_left_alone(planish, tiny_llama, tmp_path, text):
    q4 = tmp_path / "q4"
    planish("quantize", tiny_llama(), "--recipe", "rtn", "--out", q4, "--scheme", "w4g32")
    (q4 / "README.md").write_text("mine")
    planish("eval", q4, "--ppl", text, "--seqlen", "32", "--limit", "2", "--device", "cpu")
    assert (q4 / "README.md").read_text() == "mine" and (q4 / "eval.json").is_file()


def test_plan_says_what_quantize_would_take(planish, tiny_llama, text):
    quick = ("steps=2", *QUICK, "--data", text, "--target", "transformers")
    planned = planish("plan", tiny_llama(), *quick, "--no-probe")
    assert planned.status == 0, planned.err
    for word in (
        "on disk",
        "host memory",
        "time          not measured",
        "transformers  pip install auto-round",
        "it fits",
    ):
        assert word in planned.out


def test_quantize_for_a_target(planish, tiny_llama, tmp_path):
    made = planish(
        "quantize",
        tiny_llama(),
        "--recipe",
        "rtn",
        "--scheme",
        "w2g32asym",
        "--target",
        "vllm",
        "--out",
        tmp_path / "q",
    )
    assert made.status == 2 and "vllm can't load w2g32asym" in made.err and not (tmp_path / "q").exists()
    made = planish(
        "quantize", tiny_llama(), "--recipe", "rtn", "--scheme", "w2g32", "--target", "vllm", "--out", tmp_path / "q"
    )
    assert made.status == 0 and "format compressed_tensors" in made.out


def test_agreement_and_tasks(planish, tiny_llama, tmp_path, monkeypatch):
    base, q4, page = tiny_llama(), tmp_path / "q4", tmp_path / "page.html"
    planish("quantize", base, "--recipe", "rtn", "--out", q4, "--scheme", "w4g32")
    (q4 / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    (base / "chat_template.jinja").write_text((q4 / "chat_template.jinja").read_text())
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"instruction": "hello", "output": "you"}\n{"instruction": "and", "output": "so"}\n')
    words = ("eval", q4, "--agree", base, "--prompts", chats, "--device", "cpu")
    found = planish(*words)
    assert found.status == 0 and found.out.startswith("KL 0.0") and "(2 prompts, 23 tokens)" in found.out, found
    (kept,) = json.loads((q4 / "eval.json").read_text())["agreement"]
    assert (kept["with"], kept["prompts"], kept["tokens"], kept["count"]) == ("tiny", "chats.jsonl", 23, 2)
    monkeypatch.setattr("planish.eval.tasks.evaluate", lambda model, names, **how: {
        name: {"acc": 0.5, "stderr": 0.01, "acc_norm": 0.4, "acc_norm_stderr": 0.02} for name in names})  # fmt: skip
    found = planish("eval", q4, "--tasks", "piqa,boolq", "--shots", "5", "--device", "cpu")
    assert found.status == 0 and "piqa             acc 0.5000 ± 0.0100" in found.out and "mean " in found.out, found
    card = (q4 / "README.md").read_text()
    assert "| acc_norm | `piqa, 5-shot` | 0.4000 ± 0.0200 |" in card and "KL, nats a token | `chats.jsonl`" in card
    assert planish("report", q4, "--out", page).status == 0
    assert "KL in nats a token, tiny on chats.jsonl" in page.read_text() and "piqa, 5-shot, acc" in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shots", "5"), "--shots and --task-data say how --tasks are measured; give --tasks too"),
        (("--prompts", "chats.jsonl"), "--prompts says on what models agree; give the float one with --agree too"),
    ],
)
def test_options_of_what_is_not_measured(planish, tmp_path, words, said):
    refused = planish("eval", tmp_path, *words)
    assert refused.status == 2 and refused.err == f"planish: {said}\n"
