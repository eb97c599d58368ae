import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mm_c2c.align import Alignment
from mm_c2c.align.tokens import align_tokens, locate_text, token_spans
from mm_c2c.errors import AlignmentError, ShapeError, UnsupportedError

# The first call of a torch operation may take longer than hypothesis allows an example.
unhurried = settings(max_examples=60, deadline=None)
CORPUS = [
    "the cat sat on the mat . what is in the picture ?",
    "a red square, and a blue circle; answer the question with one word",
    "le chat dort près de la fenêtre 🐈 猫は窓のそばで眠る",
] * 4
TEXTS = [
    "the cat sat on the mat.",
    "  a   red square\n\nand a blue circle ",
    "the 🐈 sleeps 👩‍👧 près de la fenêtre",
    "猫は窓のそばで眠る cat",
    "answer\twith one word?!",
]


def train(model, pre_tokenizer, trainer, **kwargs) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One of each family: they cut words, spaces and multi-byte characters differently."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return {
        "bpe": train(
            models.BPE(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
        ),
        "unigram": train(
            models.Unigram(),
            pre_tokenizers.Metaspace(),
            trainers.UnigramTrainer(
                vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
            ),
        ),
        "wordpiece": train(
            models.WordPiece(unk_token="[UNK]"),
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(
                vocab_size=150, special_tokens=["[UNK]"], show_progress=False
            ),
        ),
    }


def left_pad(rows: list[list[tuple[int, int]]]) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[(-1, -1)] * (length - len(row)) + row for row in rows])


def dense(alignment: Alignment, row: int) -> dict[int, dict[int, float]]:
    """Target position to {source position: weight}; {} where the mask is False."""
    found: dict[int, dict[int, float]] = {}
    for slot, position in enumerate(alignment.target_index[row].tolist()):
        assert position not in found, "a target position comes twice"
        pairs = zip(alignment.source_index[row, slot], alignment.weights[row, slot], strict=True)
        found[position] = {int(i): float(w) for i, w in pairs if w > 0}
        assert bool(found[position]) == bool(alignment.mask[row, slot])
    return found


def brute_force(source, target) -> dict[int, dict[int, float]]:
    """Count, for each target token, the characters it shares with each source token."""
    found = {}
    for position, (start, end) in enumerate(target):
        characters = set(range(start, end)) if start >= 0 else set()
        shared = {
            i: len(characters & set(range(*span))) for i, span in enumerate(source) if span[0] >= 0
        }
        total = sum(shared.values())
        if characters:
            found[position] = {i: n / total for i, n in shared.items() if n}
    return found


@st.composite
def span_rows(draw):
    """Any spans in a text of 12 characters, template tokens between them, overlaps allowed."""
    span = st.tuples(st.integers(0, 11), st.integers(1, 4)).map(lambda s: (s[0], s[0] + s[1]))
    row = draw(st.lists(st.one_of(span, st.just((-1, -1))), min_size=0, max_size=6))
    return [*row, (0, 12)]  # so that every row has a match


@unhurried
@given(st.lists(st.tuples(span_rows(), span_rows()), min_size=1, max_size=3))
def test_weights_are_the_shared_characters_in_every_row(rows):
    sources, targets = zip(*rows, strict=True)
    source_spans, target_spans = left_pad(list(sources)), left_pad(list(targets))
    alignment = align_tokens(source_spans, target_spans)

    assert alignment.source_index.dtype == alignment.target_index.dtype == torch.int64
    assert alignment.weights.dtype == torch.float32
    assert (alignment.source_index >= 0).all()
    assert (alignment.source_index < source_spans.shape[1]).all()
    assert (alignment.source_index[alignment.weights == 0] == 0).all()
    torch.testing.assert_close(alignment.weights.sum(2), alignment.mask.float())
    for row in range(len(rows)):
        expected = brute_force(source_spans[row].tolist(), target_spans[row].tolist())
        found = dense(alignment, row)
        assert {p: pytest.approx(found[p], abs=1e-6) for p in expected} == expected
        assert not any(found[p] for p in found.keys() - expected.keys())


def test_a_target_token_without_source_is_masked_and_template_tokens_are_left_out():
    source = left_pad([[(0, 3), (4, 7)]])
    target = left_pad([[(-1, -1), (0, 3), (8, 9), (5, 7)]])
    alignment = align_tokens(source, target)
    assert alignment.target_index.tolist() == [[1, 2, 3]]
    assert alignment.mask.tolist() == [[True, False, True]]
    assert dense(alignment, 0) == {1: {0: 1.0}, 2: {}, 3: {1: 1.0}}


def test_a_row_in_a_padded_batch_is_the_row_alone():
    sources = [[(-1, -1), (0, 2), (2, 6), (-1, -1)], [(0, 3), (3, 4), (4, 9), (9, 11), (-1, -1)]]
    targets = [[(0, 6), (-1, -1)], [(-1, -1), (0, 4), (4, 10), (10, 11)]]
    source_anchors = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]])
    target_anchors = torch.tensor([[0, 0, 0, 1], [2, 0, 0, 0]])
    together = align_tokens(left_pad(sources), left_pad(targets), source_anchors, target_anchors)
    states = torch.randn(2, 5, 3)
    for row in range(2):
        source_len, target_len = len(sources[row]), len(targets[row])
        alone = align_tokens(
            left_pad([sources[row]]),
            left_pad([targets[row]]),
            source_anchors[row : row + 1, -source_len:],
            target_anchors[row : row + 1, -target_len:],
        )
        count = int(alone.mask.sum())
        mask = together.mask[row]
        assert int(mask.sum()) == count
        shift = 4 - target_len
        assert (together.target_index[row, mask] - shift == alone.target_index[alone.mask]).all()
        torch.testing.assert_close(
            together.gather(states)[row, mask],
            alone.gather(states[row : row + 1, -source_len:])[alone.mask],
        )


def test_anchored_template_tokens_take_their_partner():
    source, target = left_pad([[(0, 4), (-1, -1), (-1, -1)]]), left_pad([[(0, 4)] + [(-1, -1)] * 3])
    alignment = align_tokens(
        source, target, torch.tensor([[0, 7, 1]]), torch.tensor([[0, 0, 1, 2]])
    )
    assert dense(alignment, 0) == {0: {0: 1.0}, 2: {2: 1.0}}


def test_several_anchored_partners_weigh_the_same():
    alignment = align_tokens(
        left_pad([[(-1, -1)] * 3]),
        left_pad([[(-1, -1)]]),
        torch.tensor([[1, 0, 1]]),
        torch.tensor([[1]]),
    )
    assert dense(alignment, 0) == {0: {0: 0.5, 2: 0.5}}


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_stay_in_the_text_and_leave_out_the_space_around_a_word(tokenizers, name, text):
    for start, end in token_spans(tokenizers[name], text).tolist():
        piece = text[start:end]
        assert 0 <= start < end <= len(text)
        assert piece == piece.strip() or not piece.strip()


def test_all_tokenizers_agree_on_where_a_word_begins(tokenizers):
    raw = tokenizers["bpe"]("the cat", return_offsets_mapping=True)["offset_mapping"]
    assert raw == [(0, 3), (3, 7)]  # its own offsets hold the space
    for tokenizer in tokenizers.values():
        spans = token_spans(tokenizer, "the cat")
        words = spans[spans[:, 0] >= 3].tolist()
        assert (words[0][0], words[-1][1]) == (4, 7)


def test_a_token_of_white_space_keeps_its_span(tokenizers):
    assert token_spans(tokenizers["bpe"], "the\n\ncat")[1:3].tolist() == [[3, 4], [4, 5]]


def test_the_bytes_of_an_emoji_each_cover_it(tokenizers):
    spans = token_spans(tokenizers["bpe"], "👩 猫")
    assert len(spans) > 2
    assert all(span in ([0, 1], [1, 2], [2, 3]) for span in spans.tolist())
    assert spans.tolist().count([0, 1]) > 1


def test_special_tokens_hold_no_text(tokenizers):
    tokenizer = tokenizers["bpe"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert token_spans(tokenizer, "the").tolist() == [[0, 3]]
    spans = token_spans(tokenizer, "the", add_special_tokens=True)
    assert spans.tolist() == [[-1, -1], [0, 3]]


def test_an_empty_text_has_no_spans(tokenizers):
    assert token_spans(tokenizers["bpe"], "").shape == (0, 2)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="Slow is a slow tokenizer"):
        token_spans(Slow(), "the cat")


@pytest.mark.parametrize("source", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("target", ["bpe", "unigram", "wordpiece"])
def test_two_tokenizers_align_as_brute_force_does(tokenizers, source, target):
    sources = [token_spans(tokenizers[source], text).tolist() for text in TEXTS]
    targets = [token_spans(tokenizers[target], text).tolist() for text in TEXTS]
    source_spans = left_pad([list(map(tuple, row)) for row in sources])
    target_spans = left_pad([list(map(tuple, row)) for row in targets])
    alignment = align_tokens(source_spans, target_spans)
    for row, text in enumerate(TEXTS):
        expected = brute_force(source_spans[row].tolist(), target_spans[row].tolist())
        found = dense(alignment, row)
        assert {p: pytest.approx(found[p], abs=1e-6) for p in expected} == expected
        for position, shares in expected.items():
            start, end = target_spans[row, position].tolist()
            assert shares or text[start:end].isspace(), "a word found no partner"


@unhurried
@given(text=st.text(alphabet="the cat 🐈é猫\n.", min_size=1).filter(str.strip))
def test_every_word_finds_a_partner_in_any_text(tokenizers, text):
    source = token_spans(tokenizers["wordpiece"], text)
    target = token_spans(tokenizers["bpe"], text)
    alignment = align_tokens(source.unsqueeze(0), target.unsqueeze(0))
    for position, shares in dense(alignment, 0).items():
        start, end = target[position].tolist()
        assert bool(shares) != text[start:end].isspace()


RENDERED = "<|user|>\nwhat is it?\n<|assistant|>\n"


def test_a_rendered_prompt_counts_in_the_natural_text(tokenizers):
    text = "what is it?"
    spans = locate_text(token_spans(tokenizers["bpe"], RENDERED), RENDERED, text)
    natural = token_spans(tokenizers["bpe"], text)
    inside = spans[:, 0] >= 0
    assert sorted({c for s, e in spans[inside].tolist() for c in range(s, e)}) == [
        c for c, character in enumerate(text) if character != " "
    ]
    assert (spans[~inside] == -1).all()
    assert (~inside).any()
    assert int(spans.max()) == int(natural.max())


def test_a_token_that_straddles_the_edge_of_the_text_is_cut_to_it():
    spans = torch.tensor([[0, 3], [2, 5], [5, 7], [6, 9], [7, 9], [-1, -1]])
    found = locate_text(spans, "abcdefghi", "defg")
    assert found.tolist() == [[-1, -1], [0, 2], [2, 4], [3, 4], [-1, -1], [-1, -1]]


def test_the_last_occurrence_counts_unless_a_start_is_given():
    spans = torch.tensor([[0, 2], [3, 5], [6, 8]])
    assert locate_text(spans, "hi hi hi", "hi")[:, 0].tolist() == [-1, -1, 0]
    assert locate_text(spans, "hi hi hi", "hi", start=3)[:, 0].tolist() == [-1, 0, -1]


def test_an_empty_text_stands_nowhere():
    assert (locate_text(torch.tensor([[0, 2], [2, 3]]), "abc", "") == -1).all()


def test_a_text_that_the_template_changed_is_refused():
    with pytest.raises(AlignmentError, match=r"verbatim .*strip white space.*'what is it\? '"):
        locate_text(torch.zeros(1, 2).long(), RENDERED, "what is it? ")


def test_a_wrong_start_is_refused():
    with pytest.raises(AlignmentError, match="at character 4"):
        locate_text(torch.zeros(1, 2).long(), RENDERED, "what", start=4)


def test_a_row_without_any_match_is_named():
    source, target = left_pad([[(0, 2)], [(0, 2)]]), left_pad([[(0, 2)], [(3, 4)]])
    with pytest.raises(AlignmentError, match=r"rows \[1\]"):
        align_tokens(source, target)


def test_anchors_come_in_pairs():
    spans = left_pad([[(0, 2)]])
    with pytest.raises(AlignmentError, match="for both models or for neither"):
        align_tokens(spans, spans, source_anchors=torch.zeros(1, 1).long())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_spans": torch.zeros(2, 3).long()}, "source_spans of .batch, len, 2"),
        ({"target_spans": torch.zeros(1, 3, 2).long()}, "2 rows, target_spans 1"),
        ({"target_anchors": torch.zeros(2, 4).long()}, r"target_anchors of \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    inputs = {
        "source_spans": torch.zeros(2, 3, 2).long(),
        "target_spans": torch.zeros(2, 3, 2).long(),
        "source_anchors": torch.zeros(2, 3).long(),
        "target_anchors": torch.zeros(2, 3).long(),
    }
    with pytest.raises(ShapeError, match=message):
        align_tokens(**(inputs | change))
