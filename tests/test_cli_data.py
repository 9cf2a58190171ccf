"""The data of `nf4lora finetune`: exact ids, which tokens have a loss, packing that keeps examples apart, and every fault named."""

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from nf4lora.cli.chat import ALPACA, INPUT, MORE, Reader
from nf4lora.cli.data import IGNORED, Data, check_packing, fingerprint, load
from nf4lora.cli.packing import pack
from nf4lora.cli.rows import Row
from nf4lora.cli.settings import Settings, UserError

TEXT = "".join(f"User: how many dogs are {i} dogs? Assistant: the answer is {i * i} dogs, or none.\n" for i in range(60))
SPECIAL = ["<eos>", "<bos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# As Qwen3's: the thoughts of all answers but the last are gone
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek's: a prompt opens thoughts that no answer has
OPENING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
# As Phi-3's: the end of a chat is one more token
ENDING = CHATML.replace("{% if add", "{% if not add_generation_prompt %}<eos>{% endif %}{% if add")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TALK = [("user", "how many dogs?"), ("assistant", "the answer is 4"), ("user", "or none?"), ("assistant", "none, or 9")]


def chat(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """Byte-level BPE; like GPT-2's and Llama 3's it leaves the spaces before a word out of its offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture
def tokenizer(trained):
    """tokenizer(template) -> a new one with this chat template, or none."""

    def build(template=None, first=False) -> PreTrainedTokenizerFast:
        own = Tokenizer.from_str(trained.to_str())
        if first:
            own.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))])
        extra = {"additional_special_tokens": SPECIAL[3:]}
        made = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", **extra)
        made.chat_template = template
        return made

    return build


@pytest.fixture
def read(tmp_path):
    """read(rows, tokenizer, **settings) -> Data of a file of these rows."""

    def run(rows, made, suffix=".jsonl", vocab_size=None, **settings) -> Data:
        path = tmp_path / f"data{suffix}"
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
        return load(Settings(data=str(path), **{"seq_len": 200, **settings}), made, vocab_size or len(made))

    return run


def sequence(data: Data, i: int) -> tuple[list[int], list[int]]:
    part = slice(data.starts[i], data.starts[i + 1])
    return data.input_ids[part].tolist(), data.labels[part].tolist()


def learned(data: Data, made, i: int = 0) -> list[str]:
    """The texts of the runs of tokens with a loss, whose labels must be their ids."""
    runs, inside = [], False
    for token, label in zip(*sequence(data, i), strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1:] = [runs[-1] + [token]] if inside else [*runs[-1:], [token]]
        inside = label != IGNORED
    return [made.decode(run) for run in runs]


@pytest.mark.parametrize("loss_on", ["answers", "all"])
@pytest.mark.parametrize("packing", [False, True])
def test_text_is_joined_and_cut_without_a_gap(read, tokenizer, loss_on, packing):
    made, documents = tokenizer(CHATML), [f"{line}" for line in TEXT.splitlines()[:20]] + [""]
    ids = [i for document in documents for i in [*made.encode(document, add_special_tokens=False), made.eos_token_id]]
    data = read([{"text": document} for document in documents], made, seq_len=16, loss_on=loss_on, packing=packing)
    count = len(ids) // 16
    assert len(data) == count > 5 and data.input_ids.tolist() == ids[: 16 * count] == data.labels.tolist()
    assert data.starts.tolist() == list(range(0, 16 * count + 1, 16)) and data.position_ids is None
    assert data.counts == {
        "documents": 21, "examples": 0, "truncated": 0, "dropped": 0, "answers_left_out": 0, "sequences": count,
        "tokens": 16 * count, "loss_tokens": 15 * count,
    }  # fmt: skip
    one = read("\ufeff" + TEXT, made, suffix=".txt", seq_len=10**6)
    assert one.input_ids.tolist() == [*made.encode(TEXT, add_special_tokens=False), made.eos_token_id] and len(one) == 1
    assert {t.dtype for t in (data.input_ids, data.labels)} == {torch.int32} and data.starts.dtype == torch.int64


CASES = {
    "chatml": (CHATML, TALK, "<|im_start|>{}\n{}<|im_end|>\n", ["the answer is 4<|im_end|>\n", "none, or 9<|im_end|>\n"]),
    "marked": (MARKED, TALK, "<|im_start|>{}\n{}<|im_end|>\n", ["the answer is 4<|im_end|>", "none, or 9<|im_end|>"]),
    "llama3": (
        LLAMA3, TALK, "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>",
        ["the answer is 4<|eot_id|>", "none, or 9<|eot_id|>"],
    ),
    "empty": (CHATML, [("user", "a"), ("assistant", "")], "<|im_start|>{}\n{}<|im_end|>\n", ["<|im_end|>\n"]),
    "question last": (CHATML, TALK[:3], "<|im_start|>{}\n{}<|im_end|>\n", ["the answer is 4<|im_end|>\n"]),
    "greeting": (CHATML, TALK[1:], "<|im_start|>{}\n{}<|im_end|>\n", ["none, or 9<|im_end|>\n"]),
    "system": (CHATML, [("system", "dogs"), *TALK[:2]], "<|im_start|>{}\n{}<|im_end|>\n", ["the answer is 4<|im_end|>\n"]),
    "opening": (OPENING, TALK, "<|im_start|>{}\n{}<|im_end|>\n", ["the answer is 4<|im_end|>\n", "none, or 9<|im_end|>\n"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_on_answers_and_what_ends_them(read, tokenizer, name):
    template, turns, form, answers = CASES[name]
    made = tokenizer(template)
    text = ("<bos>" if name == "llama3" else "") + "".join(form.format(*turn) for turn in turns)
    data = read([chat(*turns)], made)
    assert sequence(data, 0)[0] == made.encode(text, add_special_tokens=False)
    assert learned(data, made) == answers
    left_out = {"greeting": 1}.get(name, 0)
    losses = sum(len(made.encode(answer, add_special_tokens=False)) for answer in answers)
    assert data.counts["answers_left_out"] == left_out and data.counts["loss_tokens"] == losses
    whole = read([chat(*turns)], made, loss_on="all")
    assert sequence(whole, 0) == (sequence(data, 0)[0],) * 2 and whole.counts["answers_left_out"] == 0


def test_other_ends_of_turns_and_of_chats(read, tokenizer):
    made = tokenizer(ENDING)
    data = read([chat(*TALK)], made)
    assert learned(data, made) == ["the answer is 4<|im_end|>\n", "none, or 9<|im_end|>\n<eos>"]
    made = tokenizer(THINKING)
    data = read([chat(*TALK)], made)
    assert learned(data, made) == ["<think></think>none, or 9<|im_end|>\n"] and data.counts["answers_left_out"] == 1
    # Nothing ends a turn here, so the end-of-text token ends the chat
    made = tokenizer(PLAIN)
    data = read([chat(("user", "a"), ("assistant", "(4)"))], made)
    assert learned(data, made) == ["(4)\n<eos>"] and made.decode(sequence(data, 0)[0]) == "user: a\nassistant: (4)\n<eos>"
    assert learned(read([chat(("user", "a"))], made, loss_on="all"), made) == ["user: a\n<eos>"]
    made = tokenizer("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert learned(read([chat(("user", "a"), ("assistant", "(4)"))], made), made) == ["a(4)"]  # the marks say what ends it


def test_a_token_on_the_border_belongs_to_the_prompt(read, tokenizer):
    """The prompt's last space and the answer's first word are one token; the offsets of this tokenizer hide the space."""
    made = tokenizer(PLAIN)
    text = "user: a\nassistant: the answer is 4\n"
    encoded = made(text, return_offsets_mapping=True)
    border = text.index("the")
    at = next(i for i, (start, _) in enumerate(encoded.offset_mapping) if start == border)
    assert made.convert_ids_to_tokens(encoded.input_ids[at]).startswith("Ġ")  # trimmed: it starts at the space
    data = read([chat(("user", "a"), ("assistant", "the answer is 4"))], made)
    assert sequence(data, 0)[1][: at + 2] == [IGNORED] * (at + 1) + [encoded.input_ids[at + 1]]
    assert made(text, return_offsets_mapping=True) == encoded  # as it was


def conversations(count: int) -> list[dict]:
    draw = random.Random(0)
    words = ["the", "answer", "is", " ", "\n", "dogs,", "é", "🐕", "none.", "<|im_end|>", "4"]
    # No leading space: transformers finds no token for it, and then loses all answers from there on
    say = lambda: " ".join(draw.choices(words, k=draw.randrange(1, 8))).strip(" ")  # noqa: E731
    return [chat(*((role, say()) for _ in range(draw.randrange(1, 4)) for role in ("user", "assistant"))) for _ in range(count)]


@pytest.mark.parametrize("tight", [False, True])
def test_marked_templates_give_the_masks_of_transformers(read, tokenizer, tight):
    """`tight`: the mark begins in the middle of a token."""
    made = tokenizer(MARKED.replace("{{ '\n' }}{% if", "{{ ' ' }}{% if") if tight else MARKED)
    chats = conversations(40)
    data = read(chats, made, seq_len=10**4)
    for i, each in enumerate(chats):
        theirs = made.apply_chat_template(each["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, labels = sequence(data, i)
        assert ids == theirs["input_ids"]
        assert [label != IGNORED for label in labels] == [bool(mask) for mask in theirs["assistant_masks"]]


def test_labels_equal_those_of_trl(read, tokenizer, tmp_path):
    from datasets import Dataset

    made, chats = tokenizer(MARKED), conversations(12)
    made.eos_token = "<|im_end|>"
    model = tiny.llama(vocab_size=len(made))
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=40, report_to="none", use_cpu=True,
        dataset_num_proc=None, bf16=False,
    )  # fmt: skip
    theirs = trl.SFTTrainer(model, config, train_dataset=Dataset.from_list(chats), processing_class=made).train_dataset
    data = read(chats, made, seq_len=40)
    kept = [row for row in theirs if any(label != IGNORED for label in row["labels"][1:40])]
    assert len(data) == len(kept) and data.counts["truncated"] > 2
    for i, row in enumerate(kept):
        assert sequence(data, i) == (row["input_ids"][:40], row["labels"][:40])


PAIRS = ("cohere", "gemma", "gemma3", "lfm2", "llama3", "nemotron_3_nano", "qwen3_instruct_2507", "smolvlm")


@pytest.mark.parametrize("name", PAIRS)
def test_found_without_marks_are_the_answers_that_trl_marks(tokenizer, name):
    """trl has these models' templates twice: as they are, and with marks."""
    folder = Path(trl.__file__).parent / "chat_templates"
    row = Row("row", messages=chat(*TALK)["messages"])
    plain, marked = (
        Reader(tokenizer((folder / f"{name}{kind}.jinja").read_text()), True).example(row) for kind in ("", "_training")
    )
    texts = [[each.text[a:b].removesuffix("<eos>") for a, b in each.answers] for each in (plain, marked)]
    assert texts[0] == texts[1] and len(texts[0]) == 2 and (plain.left_out, marked.marked) == (0, True)


@pytest.mark.parametrize("first", [False, True])
def test_instructions_without_a_template_are_alpacas(read, tokenizer, first):
    made = tokenizer(first=first)
    rows = [
        {"instruction": "count {dogs}", "input": "4 dogs", "output": "the answer is 4", "text": "all of it again"},
        {"instruction": "count", "input": " ", "output": "none"}, {"instruction": "count", "input": None, "output": ""},
        {"instruction": "count", "output": "9"},
    ]  # fmt: skip
    data = read(rows, made, seq_len=400)
    prompts = [ALPACA.format(more=MORE, instruction="count {dogs}", input=INPUT.format("4 dogs"))]
    prompts += [ALPACA.format(more="", instruction="count", input="")] * 3
    first_line = "Below is an instruction that describes a task, paired with an input that provides further context."
    assert prompts[0].startswith(first_line)
    assert prompts[0].endswith("\n\n### Instruction:\ncount {dogs}\n\n### Input:\n4 dogs\n\n### Response:\n")
    assert prompts[1].endswith("describes a task. Write a response that appropriately completes the request.\n\n"
                               "### Instruction:\ncount\n\n### Response:\n")  # fmt: skip
    for i, (prompt, answer) in enumerate(zip(prompts, ["the answer is 4", "none", "", "9"], strict=True)):
        ids = made.encode(prompt + answer, add_special_tokens=True) + [made.eos_token_id]
        assert sequence(data, i)[0] == ids and (ids[0] == made.bos_token_id) == first
        assert learned(data, made, i) == [answer + "<eos>"]


def test_instructions_with_a_template_are_chats(read, tokenizer):
    made = tokenizer(LLAMA3)
    rows = [{"instruction": "count", "input": "4 dogs", "output": "4"}, {"instruction": "count", "output": "none"}]
    chats = [chat(("user", "count\n\n4 dogs"), ("assistant", "4")), chat(("user", "count"), ("assistant", "none"))]
    shared = [{"conversations": [{"from": "human", "value": "count\n\n4 dogs"}, {"from": "gpt", "value": "4"}]}, chats[1]]
    data = read(chats, made)
    assert fingerprint(read(rows, made)) == fingerprint(data) == fingerprint(read(shared, made))
    assert fingerprint(read(json.dumps(rows, indent=1), made, ".json")) == fingerprint(data)
    assert fingerprint(read("\r\n\n".join(map(json.dumps, rows)) + "\r\n", made, ".json")) == fingerprint(data)


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")])
def test_tools_and_messages_without_content(read, tokenizer, template, end):
    template = template.replace("m.content", "m.content if m.content is defined else m.tool_calls[0].function.name")
    made = tokenizer("{% if tools %}{{ tools[0].function.name }}\n{% endif %}" + template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "count"}}]}
    tools = [{"type": "function", "function": {"name": "tool"}}]
    row = {"messages": [{"role": "user", "content": "dogs?"}, call], "tools": tools}
    data = read([row], made)
    assert made.decode(sequence(data, 0)[0]).startswith("tool\n<|im_start|>user") and learned(data, made) == ["count" + end]


BOTH = CHATML.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
                      "({{ part.text }}){% endfor %}{% endif %}")  # fmt: skip
FAILING = CHATML.replace("{{ m.content }}", "{{ '' + m.content }}")


@pytest.mark.parametrize("loss_on", ["answers", "all"])
@pytest.mark.parametrize(("template", "form"), [
    (CHATML, "{}{}"), (MARKED, "{}{}"), (LLAMA3, "{}{}"), (FAILING, "{}{}"), (CHATML.replace("m.content", "m.content | tojson"), "{}{}"),
    (BOTH, "({})({})"),
])  # fmt: skip
def test_content_in_parts_is_text(read, tokenizer, template, form, loss_on):
    """As a template has it that knows of parts, else joined; an image that is null is none."""
    made = tokenizer(template)
    parts = lambda *texts: [{"type": "text", "text": text, "image": None} for text in texts]  # noqa: E731
    found = read([chat(("user", parts("how many", " dogs?")), ("assistant", parts("the ", "answer")))], made, loss_on=loss_on)
    joined = [("user", form.format("how many", " dogs?")), ("assistant", form.format("the ", "answer"))]
    assert fingerprint(found) == fingerprint(read([chat(*joined)], made, loss_on=loss_on))


def test_a_null_is_as_no_key(read, tokenizer):
    made = tokenizer(CHATML)
    plain = [{"text": "dogs"}, chat(*TALK), {"instruction": "count", "output": "4"}]
    nulls = {"messages": None, "conversations": None, "instruction": None, "output": None, "text": None, "tools": None, "input": None}
    assert fingerprint(read([nulls | row for row in plain], made)) == fingerprint(read(plain, made))


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".TXT"])
def test_suffixes_in_capitals(read, tokenizer, suffix):
    rows = TEXT if suffix == ".TXT" else [chat(*TALK)]
    assert fingerprint(read(rows, tokenizer(CHATML), suffix)) == fingerprint(read(rows, tokenizer(CHATML), suffix.lower()))


def test_long_examples_are_cut_and_those_without_an_answer_left_dropped(read, tokenizer):
    made = tokenizer(CHATML)
    rows = [chat(("user", "dogs " * n), ("assistant", "the answer is 4")) for n in (1, 3, 9, 30)]
    full = read(rows, made)
    lengths = full.starts.diff().tolist()
    prompt = [len(made.encode(f"<|im_start|>user\n{'dogs ' * n}<|im_end|>\n<|im_start|>assistant\n")) for n in (1, 3, 9, 30)]
    cut = read(rows, made, seq_len=prompt[2] + 1)
    assert cut.starts.diff().tolist() == [min(length, prompt[2] + 1) for length in lengths[:3]]
    assert all(sequence(cut, i)[0] == sequence(full, i)[0][: prompt[2] + 1] for i in range(3))
    assert cut.counts["dropped"] == 1 and cut.counts["truncated"] == sum(n > prompt[2] + 1 for n in lengths) >= 2
    assert read(rows, made, seq_len=prompt[2]).counts["dropped"] == 2
    first = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")  # nothing predicts a first token
    only = read([chat(("user", "<|im_end|>")), chat(("user", "4<|im_end|>"))], first, loss_on="all")
    assert len(only) == 1 == only.counts["dropped"] and only.counts["loss_tokens"] == 1
    with pytest.raises(UserError, match="--seq-len: found 4, and none of the 4 examples has a token to learn within it; wanted"):
        read(rows, made, seq_len=4)


def test_texts_and_examples_in_one_file(read, tokenizer):
    made = tokenizer(CHATML)
    data = read([{"text": "dogs are dogs. " * 40}, chat(*TALK)], made, seq_len=64, packing=True)
    alone = read([{"text": "dogs are dogs. " * 40}], made, seq_len=64)
    assert data.starts[:-1].equal(alone.starts) and data.input_ids[: alone.starts[-1]].equal(alone.input_ids)
    assert data.labels[: alone.starts[-1]].equal(alone.labels) and learned(data, made, len(data) - 1) == CASES["chatml"][3]
    assert learned(read([{"text": ""}, chat(*TALK)], made), made) == CASES["chatml"][3]


def test_batches_are_padded_on_the_right(read, tokenizer):
    made = tokenizer(CHATML)
    data = read([chat(*TALK), chat(*TALK[:2]), chat(*TALK[2:])], made)
    a, b = data.starts.diff().tolist()[:2]
    batch = data.batch(torch.tensor([1, 0]))
    assert set(batch) == {"input_ids", "labels", "attention_mask"} and {t.dtype for t in batch.values()} == {torch.int64}
    for row, i in enumerate((1, 0)):
        ids, labels = sequence(data, i)
        assert batch["input_ids"][row].tolist() == ids + [made.pad_token_id] * (a - len(ids))
        assert batch["labels"][row].tolist() == labels + [IGNORED] * (a - len(ids))
    assert batch["attention_mask"].tolist() == [[1] * b + [0] * (a - b), [1] * a]
    assert set(data.batch(torch.tensor([0, 0]))) == {"input_ids", "labels"}
    made.pad_token = None
    assert read([chat(*TALK)], made).pad_token_id == made.eos_token_id
    made.add_special_tokens({"pad_token": "<more>"})
    assert read([chat(*TALK)], made, vocab_size=len(made) - 1).pad_token_id == made.eos_token_id  # a row the model lacks


def test_blocks_of_the_demonstration():
    blocks = torch.randint(256, (5, 8), dtype=torch.uint8)
    data = Data.of_blocks(blocks)
    batch = data.batch(torch.tensor([3, 1]))
    assert len(data) == 5 and set(batch) == {"input_ids", "labels"} and batch["input_ids"].equal(blocks[[3, 1]].long())
    assert batch["labels"].equal(batch["input_ids"]) and data.counts == {"sequences": 5, "tokens": 40, "loss_tokens": 35}


def test_packing_fills_sequences_with_whole_examples():
    assert pack([3, 5, 2, 8, 2], 8) == [[3], [1, 0], [2, 4]]
    assert pack([4, 6, 2, 4], 8) == [[1, 2], [0, 3]]
    draw = random.Random(1)
    for room in (16, 64, 100):
        lengths = [min(room, 1 + int(draw.expovariate(4 / room))) for _ in range(1000)]
        packed = pack(lengths, room)
        assert sorted(i for sequence in packed for i in sequence) == list(range(1000))
        assert all(sum(lengths[i] for i in sequence) <= room for sequence in packed)
        assert len(packed) <= 1.02 * sum(lengths) / room + 1


def packed_chats(count: int) -> list[dict]:
    draw = random.Random(2)
    return [
        chat(("user", "dogs? " * draw.randrange(1, 5)), ("assistant", "none. " * draw.randrange(1, 5) + str(i)))
        for i in range(count)
    ]


def parts(data: Data, i: int) -> list[tuple[list[int], list[int]]]:
    """The examples of packed sequence i."""
    ids, labels = sequence(data, i)
    positions = data.position_ids[data.starts[i] : data.starts[i + 1]].tolist()
    firsts = [*(n for n, position in enumerate(positions) if position == 0), len(ids)]
    assert positions == [n for a, b in zip(firsts, firsts[1:], strict=False) for n in range(b - a)]
    return [(ids[a:b], labels[a:b]) for a, b in zip(firsts, firsts[1:], strict=False)]


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_packed_sequences_hold_the_same_examples(read, tokenizer, loss_on):
    made = tokenizer(CHATML)
    chats = packed_chats(30)
    alone, packed = (read(chats, made, seq_len=64, loss_on=loss_on, packing=flag) for flag in (False, True))
    examples = [(ids, [IGNORED, *labels[1:]]) for ids, labels in (sequence(alone, i) for i in range(30))]
    found = [part for i in range(len(packed)) for part in parts(packed, i)]
    assert sorted(found) == sorted(examples) and len(packed) < 20 and packed.starts.diff().max() <= 64
    losses = sum(label != IGNORED for _, labels in examples for label in labels)
    assert packed.counts["loss_tokens"] == alone.counts["loss_tokens"] == losses
    order = packed.starts.diff().argsort()
    batch = packed.batch(order[[0, -1]])
    short, long = packed.starts.diff()[order[[0, -1]]].tolist()
    assert set(batch) == {"input_ids", "labels", "position_ids"} and short < long
    assert batch["position_ids"][0, short:].tolist() == list(range(long - short))
    assert batch["labels"][0, short:].eq(IGNORED).all() and batch["input_ids"][0, short:].eq(made.pad_token_id).all()
    assert fingerprint(read(chats, made, seq_len=64, loss_on=loss_on, packing=True)) == fingerprint(packed)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_packed_examples_give_the_logits_and_losses_they_give_alone(read, tokenizer, family, batch_size):
    made = tokenizer(CHATML)
    model = tiny.FAMILIES[family](vocab_size=len(made), dtype=torch.float32)
    data = read(packed_chats(6), made, seq_len=64, packing=True)
    assert 2 <= len(data) < 6
    for indices in torch.arange(len(data)).split(batch_size):
        batch = data.batch(indices)
        with torch.no_grad():
            output = model(**batch, use_cache=False)
        losses = []
        for row, i in enumerate(indices.tolist()):
            first = 0
            for ids, labels in parts(data, i):
                with torch.no_grad():
                    alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                assert (output.logits[row, first : first + len(ids)] - alone).abs().max() <= 1e-6
                losses.append(cross_entropy(alone[:-1], torch.tensor(labels[1:]), reduction="none"))
                first += len(ids)
        losses = torch.cat(losses)
        assert output.loss.item() == pytest.approx((losses.sum() / losses.count_nonzero()).item(), rel=1e-6)
    check_packing(model)


SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MIXING = {
    "MambaForCausalLM": dict(vocab_size=128, hidden_size=64, num_hidden_layers=2),
    "Lfm2ForCausalLM": dict(**SMALL, num_key_value_heads=2, full_attn_idxs=[1]),  # a convolution mixes two tokens only
    "Qwen3NextForCausalLM": dict(**SMALL, num_key_value_heads=2, **LINEAR),
    "BloomForCausalLM": dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "OPTForCausalLM": dict(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_models_that_mix_packed_examples_are_refused(kind, dtype):
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**MIXING[kind])).to(dtype).train()
    with pytest.raises(UserError, match=rf"--packing: {model.config.model_type} with .* does not keep packed examples apart"):
        check_packing(model)
    assert all(module.training for module in model.modules())


def test_models_that_keep_packed_examples_apart_are_taken():
    for attention in ("eager", "sdpa"):
        check_packing(tiny.llama(attn_implementation=attention))
    for dtype in (torch.float32, torch.bfloat16):
        check_packing(tiny.qwen3_moe(dtype=dtype))
    model = tiny.gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    check_packing(model, batch_size=1)
    assert model.training


def test_a_model_that_takes_no_positions_is_refused(monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: tiny.llama()(input_ids=input_ids, use_cache=use_cache))
    with pytest.raises(UserError, match="apart .TypeError: .*position_ids"):
        check_packing(model)


@pytest.mark.parametrize(("family", "taken"), [("llama", True), ("gpt2", False)])
def test_positions_that_run_on_matter_where_they_are_absolute(monkeypatch, family, taken):
    model, twin = tiny.FAMILIES[family](), tiny.FAMILIES[family]()

    def shifted(position_ids=None, **given):
        later = None if position_ids is None else position_ids + 30 * (torch.arange(16) >= 8)
        return twin(position_ids=later, **given)

    monkeypatch.setattr(model, "forward", shifted)
    if taken:
        check_packing(model)
    else:
        with pytest.raises(UserError, match="one example changes the logits of the next"):
            check_packing(model)


def test_a_fingerprint_is_of_everything(read, tokenizer):
    data = read(packed_chats(6), tokenizer(CHATML), seq_len=64, packing=True)
    seen = {fingerprint(data)}
    for name in ("input_ids", "labels", "starts", "position_ids"):
        fields = {key: getattr(data, key) for key in ("input_ids", "labels", "starts", "position_ids")}
        fields[name] = fields[name].clone()
        fields[name][-1] += 1
        seen.add(fingerprint(Data(**fields)))
    assert len(seen) == 5


USER = {"role": "user", "content": "a"}
FAULTS = {
    "no json": (CHATML, b'{"text": "a"}\n{"messages": [', "line 2 is not JSON"),
    "a list": (CHATML, b"\n[1]\n", "line 2 is a JSON list; wanted an object"),
    "keys": (CHATML, [{"prompt": "a"}], "line 1 has the keys ['prompt']; wanted \"text\" with a string, \"instruction\""),
    "half an instruction": (CHATML, [{"instruction": "a"}], "line 1 has the keys ['instruction']; wanted"),
    "kind of output": (
        CHATML, [{"instruction": "a", "output": 3}],
        'line 1 has "instruction", "input" and "output" of str, str, int; wanted strings',
    ),
    "no messages": (CHATML, [chat(*TALK), {"messages": []}], 'line 2 "messages" is an empty list; wanted a list of messages'),
    "messages of text": (CHATML, [{"messages": "a"}], '"messages" is a str; wanted a list of messages'),
    "message of text": (CHATML, [{"messages": ["a"]}], 'line 1 "messages" number 1 is a str; wanted an object with "role"'),
    "no content": (CHATML, [{"messages": [USER, {"role": "assistant"}]}], "number 2 has the keys ['role']; wanted \"role\" and"),
    "kind of role": (CHATML, [{"conversations": [{"from": 3, "value": "a"}]}], '"conversations" number 1 has the keys'),
    "null messages": (CHATML, [{"messages": None}], "line 1 has the keys ['messages']; wanted \"text\" with a string"),
    "an image": (
        CHATML, [chat(*TALK), chat(("user", [{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]), ("assistant", "a"))],
        'line 2 "messages" number 1 "content" number 2 has the keys [\'type\', \'url\'] and the type image; wanted {"type": "text",',
    ),
    "a part of text": (CHATML, [chat(("user", ["a"]), ("assistant", "a"))], 'line 1 "messages" number 1 "content" number 1 is a str;'),
    "a part without text": (CHATML, [chat(("user", [{"type": "text"}]), ("assistant", "a"))], "has the keys ['type'] and the type text"),
    "long keys": (CHATML, [{"k" * 10_000: 1}], "line 1 has the keys ['kkk"),
    "long keys of a message": (CHATML, [{"messages": [{"k" * 10_000: 1}]}], "number 1 has the keys ['kkk"),
    "long refusal": ("{{ raise_exception(messages[0].content) }}", [chat(("user", "a" * 10_000), ("assistant", "b"))], "its messages (aaa"),
    "no answer": (CHATML, [chat(*TALK), {"messages": [USER]}], 'line 2 has no message of the role "assistant" to learn from'),
    "no template": (None, [chat(*TALK)], 'line 1 has "messages", but the tokenizer has no chat template; wanted "text"'),
    "roles refused": (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML,
        [chat(*TALK), chat(*TALK[1:])],
        "line 2: the chat template refuses its messages (user first)",
    ),
    "template torn": ("{% for", [chat(*TALK)], "line 1: the chat template refuses its messages ("),
    "answers hidden": (
        "{{ messages | length }}" + CHATML, [chat(*TALK)],
        "line 1: the chat template does not let its answers be told from the rest; give --loss-on all, or",
    ),
    "marks unused": (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}", [chat(*TALK)], "line 1: the chat template does not let",
    ),
    "half a letter": (CHATML, b'{"text": "a"}\n{"text": "dog \\ud83d"}', "line 2 has a lone surrogate"),
    "half in an instruction": (CHATML, b'{"instruction": "\\udc00", "output": "a"}', "line 1 has a lone surrogate"),
    "half in a chat": (CHATML, [chat(("user", "\ud83d"), ("assistant", "a"))], "line 1: the chat template refuses its messages ("),
    "deep": (CHATML, b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_names_its_line(read, tokenizer, name):
    template, rows, message = FAULTS[name]
    with pytest.raises(UserError) as error:
        read(rows, tokenizer(template))
    assert message in str(error.value) and str(error.value).startswith("--data: ") and "data.jsonl" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_faults_of_lists_and_of_tokenizers(read, tokenizer):
    made = tokenizer(CHATML)
    with pytest.raises(UserError, match=r"data\.json item 2 is a JSON int; wanted an object"):
        read(json.dumps([chat(*TALK), 3]), made, ".json")
    with pytest.raises(UserError, match=r"data\.json is not JSON .*; wanted a list of objects"):
        read('[{"text": "a"}', made, ".json")
    with pytest.raises(UserError, match=r"data\.json is empty: 0 lines without text"):
        read("[]", made, ".json")
    for rows in ([chat(*TALK)], [{"text": "<|im_start|>" * 4}]):
        highest = max(sequence(read(rows, made), 0)[0])
        with pytest.raises(UserError, match=f"--model: its tokenizer gives token {highest}, but the model has {highest}; wanted"):
            read(rows, made, vocab_size=highest)
    slow = transformers.ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(UserError, match="--loss-on answers: a ByT5Tokenizer does not tell which characters .* give --loss-on all"):
        read([chat(*TALK)], slow)
    assert learned(read([chat(*TALK)], slow, loss_on="all"), slow)[0].startswith("<|im_start|>user\nhow many")
