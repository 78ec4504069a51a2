"""lm-eval's adapter on local tasks, without a network: scores and answers are the engine's own."""

import json
import sys

import pytest
from generation import random_model, train

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_owl2.config.templates import OWL2
from megatron_owl2.data.conversation import asking_ids
from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.adapters import lm_eval as adapter
from megatron_owl2.evaluation.adapters.generation import batch_size_of, generation_options
from megatron_owl2.inference import api
from megatron_owl2.inference.api import InferenceModel
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request

COLORS = ["red", "green", "blue"]
ROWS = [
    {"question": f"what color is the {word} one ?", "gold": n % 3, "answer": COLORS[n % 3]}
    for n, word in enumerate(("top", "left", "right", "left top", "right top"))
]
_DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
CHOICE = _DATA + (
    "task: local_choice\noutput_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
    "doc_to_choice: [red, green, blue]\ndoc_to_target: gold\n"
    "metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n"
)
GENERATE = _DATA + (
    "task: local_generate\noutput_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
    'doc_to_target: answer\ngeneration_kwargs: {{until: [e, "\\n"], max_gen_toks: 9}}\n'
    "metric_list: [{{metric: exact_match}}]\n"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return random_model(train(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def model(loaded, monkeypatch):
    """lm-eval's model around a random one."""
    monkeypatch.setattr(api, "load", lambda path, precision, adapter: InferenceModel(loaded))
    return adapter.MegatronOwl2("somewhere", batch_size=2, max_gen_toks=7)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(model, tasks, name, **options):
    """The metrics of a task, and its samples."""
    quiet = {"bootstrap_iters": 0, "log_samples": True}
    done = simple_evaluate(model, tasks=[name], task_manager=tasks, **quiet, **options)
    samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
    return done["results"][name], samples


def test_a_multiple_choice_task_compares_likelihoods(model, tasks, loaded):
    metrics, samples = evaluated(model, tasks, "local_choice")
    encode, bos, right = loaded.tokenizer.encode, loaded.tokenizer.bos_id, 0
    for sample, row in zip(samples, ROWS, strict=True):
        context = [bos, *encode(row["question"])]
        whole = [[bos, *encode(f"{row['question']} {color}")] for color in COLORS]
        own = model.model.generator.log_likelihoods(
            [context] * 3, [ids[len(context) :] for ids in whole]
        )
        said = [(float(total), greedy) for (total, greedy), *_ in sample["resps"]]
        assert [total for total, _ in said] == pytest.approx([s.total for s in own], abs=1e-4)
        assert [str(greedy) for _, greedy in said] == [str(s.greedy) for s in own]
        totals = [s.total for s in own]
        right += totals.index(max(totals)) == row["gold"]
    assert metrics["acc,none"] == right / len(ROWS)
    assert 0 <= metrics["acc_norm,none"] <= 1


def test_a_generation_task_is_answered_by_the_engine(model, tasks, loaded):
    metrics, samples = evaluated(model, tasks, "local_generate")
    options = GenerationOptions(max_new_tokens=9, stop=["e", "\n"])
    ids = [[loaded.tokenizer.bos_id, *loaded.tokenizer.encode(r["question"])] for r in ROWS]
    own = model.model.generator.complete([Request(one, (), options) for one in ids])
    assert [sample["resps"][0][0] for sample in samples] == [one.text for one in own]
    assert len({one.text for one in own}) > 1 and not any("e" in one.text for one in own)
    assert metrics["exact_match,none"] == sum(
        one.text == row["answer"] for one, row in zip(own, ROWS, strict=True)
    ) / len(ROWS)


def test_the_chat_template_is_the_models(model, tasks, loaded):
    chat = {"apply_chat_template": True, "system_instruction": "be kind"}
    _, samples = evaluated(model, tasks, "local_generate", **chat)
    ids = asking_ids([[ROWS[0]["question"]]], [], loaded.tokenizer, OWL2, "be kind")
    text = samples[0]["arguments"][0][0]
    assert model.tok_encode(text) == ids
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(history, False) == "USER: a ASSISTANT: It is"
    with pytest.raises(TaskError, match="leave out --fewshot_as_multiturn"):
        model.apply_chat_template([*history, history[0]])
    assert model.tokenizer_name.startswith("owl2-")


def test_a_template_whose_texts_are_cut_is_refused(model, monkeypatch):
    config = model.model.config
    monkeypatch.setattr(config, "template", "owl1")
    asked = model.apply_chat_template([{"role": "user", "content": "a"}])
    assert asked.endswith("user's questions.\nHuman: a\nAI:")
    monkeypatch.setattr(config, "tokenization", "official_train")
    with pytest.raises(TaskError, match="tokenization is official_train, .* owl2 evaluate"):
        model.apply_chat_template([{"role": "user", "content": "a"}])


def instance(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


def test_rolling_likelihoods_score_every_id_once(model, loaded):
    texts = ["what color is the top one ?", "red", "blue green " * 25, ""]
    requests = [instance("loglikelihood_rolling", text) for text in texts]
    totals = model.loglikelihood_rolling(requests, disable_tqdm=True)
    bos, generator = loaded.tokenizer.bos_id, model.model.generator
    for text, total in zip(texts[:2], totals, strict=False):
        (own,) = generator.log_likelihoods([[bos]], [loaded.tokenizer.encode(text)])
        assert total == pytest.approx(own.total, abs=1e-4)
    ids = loaded.tokenizer.encode(texts[2])
    size = model.max_length  # windows of as many ids, behind the one before them
    assert len(ids) > size + 2
    pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
    (first,) = generator.log_likelihoods([[bos]], [pieces[0]])
    rest = ids[size:]
    before = ids[len(ids) - size - 1 : size]
    (second,) = generator.log_likelihoods([before], [rest])
    assert len(pieces) == 2 and totals[2] == pytest.approx(first.total + second.total, abs=1e-3)
    assert totals[3] == 0


def test_texts_that_are_too_long_lose_their_beginning(model, loaded, caplog):
    long, encode = "blue green " * 60, loaded.tokenizer.encode
    pair = instance("loglikelihood", long, " red")
    ((total, _),) = model.loglikelihood([pair], disable_tqdm=True)
    whole = [loaded.tokenizer.bos_id, *encode(long.rstrip() + "  red")]
    context = len([loaded.tokenizer.bos_id, *encode(long.rstrip())])
    (own,) = model.model.generator.log_likelihoods(
        [whole[len(whole) - model.max_length - 1 : context]], [whole[context:]]
    )
    assert total == pytest.approx(own.total, abs=1e-4)
    asked = [instance("generate_until", long, {"until": "x"})]
    (text,) = model.generate_until(asked, disable_tqdm=True)
    assert text.count("x") == 0
    assert caplog.text.count("1 of 1 texts are longer than the decoder's positions") == 2


def test_generation_kwargs_are_read_as_lm_eval_reads_them():
    assert generation_options({}, 7) == GenerationOptions(7, stop=[])
    given = {"until": ["a", ""], "do_sample": False, "temperature": 0.7, "max_tokens": 3}
    assert generation_options(given, 7) == GenerationOptions(3, stop=["a"])
    given = {"until": "b", "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": None}
    expected = GenerationOptions(7, stop=["b"], temperature=0.7, top_p=0.9)
    assert generation_options(given, 7) == expected
    assert generation_options({"temperature": 0, "top_p": 0}, 7) == GenerationOptions(7, stop=[])
    assert generation_options({"num_beams": 3, "until": None}, 7).beams == 3
    for given, told in (
        ({"contrastive": 1}, "'contrastive', which this model has not"),
        ({"top_p": 3, "temperature": 1}, "top_p is 3"),
        ({"temperature": "hot"}, "generation_kwargs of the task: could not"),
        ({"top_k": "x", "temperature": 1}, "generation_kwargs of the task"),
    ):
        with pytest.raises(TaskError, match=told):
            generation_options(given, 7)
    assert [batch_size_of(value) for value in ("auto:4", "8", 2)] == [32, 8, 2]
    with pytest.raises(TaskError, match="batch_size is '0'"):
        batch_size_of("0")


def test_the_command_is_lm_evals(monkeypatch, capsys, tmp_path):
    arguments = ["run", "--model", "megatron_owl2", "--model_args", "checkpoint=no"]
    rest = ["--tasks", str(tmp_path / "choice.yaml"), "--batch_size", "auto"]
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, *rest])
    assert adapter.main() == 2
    assert "error: no is not a directory" in capsys.readouterr().err
