"""The loss is on the assistant's tokens only, with an end of turn, whatever the chat template does."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ftray.data.encode import Chunk, Encoder, Item
from ftray.data.format import Example, Unusable
from ftray.data.render import Piece, Renderer
from ftray.data.tokenise import PieceTokeniser
from ftray.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the header lies inside the marked block only for the last message
MARKED_NOT_EVERYWHERE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2: BOS for each exchange, no generation prompt, roles must alternate, contents are trimmed
INST = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Qwen 3: reasoning is stripped from the history, and the last answer gets an empty block
REASONING = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# reasoning models whose generation prompt opens the block that the rendered history does not have
OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1].strip() + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Alpaca: nothing ends an answer
HEADINGS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
CLOSED_ONCE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SPACE_IN_PROMPT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<|call|>' + (call.function | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
TALK = [*ASKED, {"role": "user", "content": "A latte 🙂"}, {"role": "assistant", "content": "end"}]


def _texts(tokenizer, messages, train_on="assistant", tools=None):
    """Each example as (whole text, trained texts with ... where EOS is added)."""
    examples = Renderer(tokenizer, train_on).pieces(Example(messages=messages, tools=tools))
    return [
        ("".join(p.text for p in pieces), [p.text + ("..." if p.eos else "") for p in pieces if p.trained])
        for pieces in examples
    ]


def _encoded(tokenizer, messages, **options):
    encoded = Encoder(tokenizer, **options)(Chunk(False, [Item(0, "f", 1, Example(messages=messages))]))
    assert not encoded.dropped, encoded.dropped
    cuts = np.cumsum(encoded.lengths)[:-1]
    return list(zip(np.split(encoded.ids, cuts), np.split(encoded.trained, cuts), strict=True))


@pytest.mark.parametrize("template", [CHATML, MARKED_WITHOUT_END, MARKED_NOT_EVERYWHERE])
def test_every_answer_is_trained_with_its_end_of_turn(make_tokenizer, template):
    (whole, trained), *others = _texts(make_tokenizer(template), TALK)
    assert trained == ["Hello!<|im_end|>", "end<|im_end|>"]
    assert whole.endswith("end<|im_end|>")
    assert not others


def test_bos_and_eos_of_the_template_are_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(INST, bos_token="<|bos|>", eos_token="<|endoftext|>")
    ((whole, trained),) = _texts(tokenizer, TALK)
    assert trained == [" Hello! <|endoftext|>", " end <|endoftext|>"]
    ((ids, mask),) = _encoded(tokenizer, TALK)
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert (ids == tokenizer.bos_token_id).sum() == 2  # one for each exchange, as the template says
    assert (ids[mask] == tokenizer.eos_token_id).sum() == 2


def test_a_tokenizer_that_adds_bos_by_itself_does_not_add_one_to_a_rendered_chat(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML)
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    ((ids, _),) = _encoded(tokenizer, TALK)
    assert ids[:2].tolist().count(tokenizer.bos_token_id) == 1
    text = Encoder(tokenizer)(Chunk(False, [Item(0, "f", 1, Example(text=text)) for text in ("ab", "<|bos|>ab")]))
    first, second = np.split(text.ids, [text.lengths[0]])
    assert (
        first.tolist()
        == second.tolist()
        == [tokenizer.bos_token_id, *tokenizer("ab")["input_ids"][1:], tokenizer.eos_token_id]
    )


def test_a_template_that_strips_reasoning_from_the_history_gives_one_example_per_answer(make_tokenizer):
    messages = [dict(message) for message in TALK]
    messages[1]["content"] = "<think>\nwho?\n</think>\n\nHello!"
    examples = _texts(make_tokenizer(REASONING), messages)
    empty = "<think>\n\n</think>\n\n"
    assert [trained for _, trained in examples] == [[f"{empty}Hello!<|im_end|>"], [f"{empty}end<|im_end|>"]]
    assert examples[0][0] == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{empty}Hello!<|im_end|>"
    assert "<|im_start|>assistant\nHello!<|im_end|>" in examples[1][0]


def test_a_generation_prompt_that_opens_a_block_is_kept_and_not_repeated(make_tokenizer):
    messages = [ASKED[0], {"role": "assistant", "content": "<think>\nwho?\n</think>\n\nHello!"}]
    tokenizer = make_tokenizer(OPENS_THINKING)
    ((whole, trained),) = _texts(tokenizer, messages)
    assert trained == ["who?\n</think>\n\nHello!<|im_end|>"]
    assert whole == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n" + trained[0]


def test_an_answer_without_an_end_in_the_template_gets_eos_and_an_example_of_its_own(make_tokenizer):
    tokenizer = make_tokenizer(HEADINGS, eos_token="<|endoftext|>")
    examples = _texts(tokenizer, TALK)
    assert [trained for _, trained in examples] == [["Hello!..."], ["end..."]]
    assert examples[1][0].startswith("### user:\nHi\n\n### assistant:\nHello!\n\n### user:")
    for ids, mask in _encoded(tokenizer, TALK):
        assert ids[-1] == tokenizer.eos_token_id
        assert mask[-1]


def test_an_end_that_only_the_conversation_has_is_trained_in_every_example(make_tokenizer):
    tokenizer = make_tokenizer(CLOSED_ONCE, eos_token="<|endoftext|>")
    examples = _texts(tokenizer, TALK)
    assert [trained for _, trained in examples] == [["Hello!\n<|endoftext|>"], ["end\n<|endoftext|>"]]
    assert all(whole.startswith("<|bos|><|im_start|>") for whole, _ in examples)


def test_a_tokenizer_without_a_template_gets_the_plain_one(make_tokenizer):
    tokenizer = make_tokenizer(None, eos_token="<|endoftext|>")
    ((whole, trained),) = _texts(tokenizer, TALK)
    assert trained == [" Hello!<|endoftext|>", " end<|endoftext|>"]
    assert whole.startswith("User: Hi\n\nAssistant: Hello!<|endoftext|>\n\nUser: A latte")
    assert Renderer(tokenizer).prompt(Example(messages=ASKED)) == "User: Hi\n\nAssistant:"


def test_the_plain_template_begins_with_bos_where_the_tokenizer_would_put_it(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    assert Renderer(tokenizer).prompt(Example(messages=ASKED)) == "<|bos|>User: Hi\n\nAssistant:"
    ((ids, _),) = _encoded(tokenizer, ASKED)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_with_neither_template_nor_eos_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an EOS token"):
        Renderer(tokenizer)


@pytest.mark.parametrize("template", [CHATML, MARKED_WITHOUT_END, INST, REASONING, HEADINGS, SPACE_IN_PROMPT, None])
def test_what_comes_before_an_answer_is_exactly_what_the_model_is_asked(make_tokenizer, template):
    tokenizer = make_tokenizer(
        template, eos_token="<|endoftext|>" if template in (INST, HEADINGS, None) else "<|im_end|>"
    )
    renderer, tokenise = Renderer(tokenizer), PieceTokeniser(tokenizer)
    asked = tokenise.texts([renderer.prompt(Example(messages=TALK[:end])) for end in (2, 4)])
    seen = []
    for ids, mask in _encoded(tokenizer, TALK):
        starts = np.flatnonzero(np.diff(mask.astype(int)) == 1) + 1
        seen += [ids[:start].tolist() for start in starts]
    assert seen == asked


def test_a_space_at_the_end_of_the_prompt_is_not_merged_into_the_answer(make_tokenizer):
    tokenizer = make_tokenizer(SPACE_IN_PROMPT)
    ((ids, mask),) = _encoded(tokenizer, ASKED)
    assert tokenizer.decode(ids[mask]) == "Hello!<|im_end|>"
    assert tokenizer.decode(ids[~mask]).endswith("assistant: ")


def test_white_space_before_an_answer_is_grouped_as_it_is_when_asked(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    tokenise = PieceTokeniser(tokenizer)
    # this pre-tokenizer groups white space up to the last character before a word
    for prompt in ("user:\n\n", "user: \n ", "user:  ", "user:"):
        pieces = tokenise([[Piece(prompt, False), Piece("Hello", True), Piece("\n\n", False), Piece("\n", True)]])
        assert pieces[0] == tokenise.texts([prompt])[0]
        assert tokenizer.decode([i for ids in pieces for i in ids]) == prompt + "Hello\n\n\n"


def test_special_tokens_that_take_in_white_space_do_so_as_when_asked(make_tokenizer):
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_special_tokens({"eos_token": AddedToken("<|turn|>", rstrip=True, special=True)})
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|turn|>")
    ((ids, mask),) = _encoded(tokenizer, TALK)
    ((whole, _),) = _texts(tokenizer, TALK)
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[mask]).replace("\n", "") == "Hello!<|turn|>end<|turn|>"


def test_characters_of_several_tokens_are_trained_whole(make_tokenizer):
    answer = "日本 🚀 naïve\u0301 👩‍👩‍👧"
    tokenizer = make_tokenizer(CHATML)
    ((ids, mask),) = _encoded(tokenizer, [TALK[2], {"role": "assistant", "content": answer}])
    assert tokenizer.decode(ids[mask]) == answer + "<|im_end|>"
    assert mask.sum() > len(answer)


@pytest.mark.parametrize("prepend_scheme", ["always", "first"])
def test_a_tokenizer_that_puts_a_space_before_texts_does_not_put_one_before_answers(prepend_scheme):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=300, show_progress=False)
    backend.train_from_iterator(
        ["user assistant hello there a latte please [INST] [/INST]\n : Hi Hello! A end"] * 5, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = INST
    talk = [*ASKED, {"role": "user", "content": "A latte"}, TALK[3]]
    ((whole, _),) = _texts(tokenizer, talk)
    ((ids, mask),) = _encoded(tokenizer, talk)
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[mask]).split() == ["Hello!", "</s>", "end", "</s>"]


def test_a_weight_of_zero_leaves_an_answer_out(make_tokenizer):
    for template in (CHATML, MARKED_WITHOUT_END, HEADINGS):
        tokenizer = make_tokenizer(template)
        quiet = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
        trained = [text for _, texts in _texts(tokenizer, quiet) for text in texts]
        assert len(trained) == 1
        assert trained[0].startswith("end")
        with pytest.raises(Unusable, match="no message to train on"):
            _texts(tokenizer, quiet[:2])


def test_what_follows_the_last_trained_answer_is_cut_off(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ((whole, trained),) = _texts(tokenizer, [*TALK[:3], {**TALK[3], "weight": 0}])
    assert whole.endswith("Hello!<|im_end|>")
    assert trained == ["Hello!<|im_end|>"]


def test_train_on_last_trains_the_last_answer_only(make_tokenizer):
    for template in (CHATML, MARKED_WITHOUT_END, REASONING):
        ((_, trained),) = _texts(make_tokenizer(template), TALK, train_on="last")
        assert [text.removeprefix("<think>\n\n</think>\n\n") for text in trained] == ["end<|im_end|>"]


def test_train_on_all_trains_everything_but_answers_of_weight_zero(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ((whole, trained),) = _texts(tokenizer, TALK, train_on="all")
    assert trained == [whole]
    assert whole.endswith("end<|im_end|>")
    quiet = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    ((whole, trained),) = _texts(tokenizer, quiet, train_on="all")
    assert "".join(trained) == whole.replace("Hello!<|im_end|>", "", 1)


def test_roles_that_the_template_refuses_are_a_bad_row_with_its_reason(make_tokenizer):
    with pytest.raises(Unusable, match=r"roles must alternate \(roles: user, user, assistant\)") as refused:
        _texts(make_tokenizer(INST), [TALK[0], *ASKED])
    assert refused.value.bad
    assert refused.value.kind == "the chat template refuses the row"


def test_a_conversation_that_the_assistant_opens_trains_what_was_asked_for(make_tokenizer):
    ((_, trained),) = _texts(make_tokenizer(CHATML), [TALK[1], *ASKED])
    assert trained == ["Hello!<|im_end|>"]
    with pytest.raises(Unusable, match="nothing before it"):
        _texts(make_tokenizer(CHATML), [TALK[1]])


def test_tool_calls_are_trained_up_to_the_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer(TOOLS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|call|>"]})
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    ((whole, trained),) = _texts(tokenizer, [*messages, TALK[1]], tools=[{"name": "f"}])
    assert trained == ['<|call|>{"name": "f", "arguments": {"x": 1}}<|im_end|>', "Hello!<|im_end|>"]
    assert whole.startswith('<|im_start|>system\n[{"name": "f"}]')


@pytest.mark.parametrize("template", [CHATML, INST, SPACE_IN_PROMPT, TOOLS])
def test_the_short_way_for_later_rows_gives_what_the_long_way_gives(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    warm = Renderer(tokenizer)
    warm.pieces(Example(messages=TALK))
    contents = [
        "end",
        "<|im_end|>",
        "assistant",
        "a\nb",
        " padded ",
        "\ue000",
        "Hello! Hello!",
        "<think>x</think>y",
        "é" * 9,
    ]
    for n, content in enumerate(contents):
        other = contents[(n + 3) % len(contents)]
        talk = [
            {"role": "user", "content": other},
            {**TALK[1], "content": content},
            TALK[2],
            {**TALK[3], "content": other},
        ]
        assert warm.pieces(Example(messages=talk)) == Renderer(tokenizer).pieces(Example(messages=talk))
    assert warm._frames


def test_the_short_way_renders_twice_however_many_answers_there_are(make_tokenizer, monkeypatch):
    renderer = Renderer(make_tokenizer(CHATML))
    talk = Example(messages=TALK * 5)
    renderer.pieces(talk)
    calls = []
    render = renderer._jinja
    monkeypatch.setattr(renderer, "_jinja", lambda *args, **options: calls.append(1) or render(*args, **options))
    renderer.pieces(talk)
    assert len(calls) == 2


# templates for images, whose messages are lists of parts, are not for text models
STOCK = Path(find_spec("trl").origin).parent / "chat_templates" if find_spec("trl") else Path()
TEXT_ONLY = [path for path in sorted(STOCK.glob("*.jinja")) if not re.match("idefics|llava|smolvlm", path.name)]
TOKEN = re.compile(
    r"<\|?[^|<>\s{}]{1,30}\|>|<\|[^|<>\s{}]{1,30}>|<(?:start_of_turn|end_of_turn|bos|eos)>|</?s>|<｜[^<>]+｜>"
)
EOS = (
    "<|END_OF_TURN_TOKEN|>",
    "<|im_end|>",
    "<turn|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)


@pytest.mark.parametrize("path", TEXT_ONLY, ids=lambda path: path.stem)
def test_stock_templates_train_answers_after_exactly_what_is_asked(make_tokenizer, path):
    template = path.read_text(encoding="utf-8")
    special = sorted({*TOKEN.findall(template), "<|endoftext|>"})
    tokenizer = make_tokenizer(template, eos_token=next((eos for eos in EOS if eos in special), "<|endoftext|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    plain = [TALK[0], TALK[1], {"role": "user", "content": "A latte"}, {"role": "assistant", "content": "Here it is."}]
    thought = [
        {**m, "content": f"<think>\nhm {n}\n</think>\n\n{m['content']}"} if n % 2 else m for n, m in enumerate(plain)
    ]
    for talk in (plain, thought):
        renderer = Renderer(tokenizer)
        asked = [renderer.prompt(Example(messages=talk[:end])) for end in (2, 4)]
        found = []
        for pieces in renderer.pieces(Example(messages=talk)):
            assert not pieces[0].trained
            for n, piece in enumerate(pieces):
                if piece.trained:
                    found.append("".join(before.text for before in pieces[:n]))
                    answer, end = re.fullmatch(r"(?s)(.*(?:Hello!|Here it is\.))(.*)", piece.text).groups()
                    assert "latte" not in answer
                    assert piece.eos or TOKEN.search(end)
        # an answer whose reasoning is stripped from the history is asked after the history as it is rendered
        assert found == asked


def test_tool_calls_that_a_template_leaves_out_are_a_bad_row(make_tokenizer):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}
    messages = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TALK[1],
    ]
    with pytest.raises(Unusable, match="leaves tool calls out: look_up"):
        _texts(make_tokenizer(CHATML), messages)


def test_arguments_are_written_as_the_template_wants_them(make_tokenizer):
    joins = TOOLS.replace("(call.function | tojson)", "call.function.name + call.function.arguments")
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}
    messages = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    ((_, trained),) = _texts(make_tokenizer(joins), messages)
    assert trained == ['<|call|>look_up{"x": 1}<|im_end|>']


def test_an_answer_that_a_template_does_not_write_is_a_bad_row(make_tokenizer):
    parts = (
        "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(Unusable, match="does not write the answer: message 2: 'Hello!'"):
        _texts(make_tokenizer(parts), ASKED)


def test_markers_that_enclose_the_header_do_not_make_it_trained(make_tokenizer):
    encloses = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for messages in (TALK, TALK[:2]):
        ((_, trained),) = _texts(make_tokenizer(encloses), messages)
        assert trained == ["Hello!<|im_end|>", "end<|im_end|>"][: len(messages) // 2]


def test_reasoning_outside_the_markers_is_not_trained(make_tokenizer):
    skips = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think></think>' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ((_, trained),) = _texts(make_tokenizer(skips), TALK)
    assert trained == ["Hello!<|im_end|>", "end<|im_end|>"]
