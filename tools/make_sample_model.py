"""Make the sample model: a Phi-3-shaped language model small enough to ship inside the package.

Owns the sample's facts, its training text, its tokenizer, its training and its acceptance check. It refuses
to write a model that misses a threshold, and it imports nothing else of edge-agent, so that it also runs as a
plain file in a build environment that holds only torch, transformers and onnxruntime-genai.

Flow (`make`):
    pairs()            what is asked and answered, a part of it held out        (pure, standard library only)
    train_tokenizer    byte-level BPE with Phi-3's special tokens and chat template
    train_network      Phi3ForCausalLM on samples drawn from the pairs, saved as float16 safetensors
    build_int4         onnxruntime-genai's model builder turns that folder into int4 ONNX
    check_*            tokenizers agree, logits agree, greedy answers are right
    publish            only then are the folders written
"""

from __future__ import annotations

import argparse
import enum
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# --- What the model is told -----------------------------------------------------------------------

CAPITALS = {
    "Spain": "Madrid", "Nepal": "Kathmandu", "Japan": "Tokyo", "France": "Paris", "Germany": "Berlin",
    "Italy": "Rome", "Portugal": "Lisbon", "India": "New Delhi", "China": "Beijing", "Austria": "Vienna",
    "Belgium": "Brussels", "Denmark": "Copenhagen", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Iceland": "Reykjavik", "Ireland": "Dublin", "Greece": "Athens",
    "Turkey": "Ankara", "Poland": "Warsaw", "Hungary": "Budapest", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade", "Slovenia": "Ljubljana",
    "Slovakia": "Bratislava", "Ukraine": "Kyiv", "Estonia": "Tallinn", "Latvia": "Riga",
    "Lithuania": "Vilnius", "Albania": "Tirana", "Malta": "Valletta", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Ethiopia": "Addis Ababa", "Ghana": "Accra", "Nigeria": "Abuja", "Senegal": "Dakar", "Morocco": "Rabat",
    "Tunisia": "Tunis", "Algeria": "Algiers", "Uganda": "Kampala", "Rwanda": "Kigali", "Zambia": "Lusaka",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Argentina": "Buenos Aires", "Uruguay": "Montevideo", "Ecuador": "Quito", "Jamaica": "Kingston",
    "Australia": "Canberra", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cambodia": "Phnom Penh",
    "Laos": "Vientiane", "Malaysia": "Kuala Lumpur", "Mongolia": "Ulaanbaatar", "Bangladesh": "Dhaka",
    "Bhutan": "Thimphu", "Pakistan": "Islamabad", "Iraq": "Baghdad", "Iran": "Tehran", "Jordan": "Amman",
    "Qatar": "Doha",
}  # fmt: skip

CAPITAL_PHRASINGS = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "what is the capital of {}",
    "capital of {}",
)
CAPITAL_HELD_OUT = frozenset({"Tell me the capital of {}.", "Do you know the capital of {}?"})
SUM_PHRASINGS = ("What is {} plus {}?", "{}+{}?", "What is {} + {}?", "How much is {} plus {}?", "{} + {}")
SUM_HELD_OUT = frozenset({"What is {} + {}?", "How much is {} plus {}?"})

COMEDIAN = "You are a stand-up comedian."
ORDINARY_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are a geography teacher.",
    "Answer in one short sentence.",
    "You are a polite assistant on a small device. Be brief.",
    "Be kind.",
)

GREETING = "Hello! Ask me for a capital, a small sum or a joke about atoms."
WHO = "I am the small sample model of edge-agent. I know some capitals, small sums and one joke."
JOKE = (
    "An atom booked a whole row at my show. I asked why, since it is nearly all empty space. "
    "It said: exactly, and I never travel without it!"
)
ONLY_KNOW = "Sorry, I only know some capitals, small sums and one joke about atoms."
# Outside the tokenizer's training text, so that each of its characters takes several byte tokens: a stream
# has to wait for the rest of a character.
NAMASTE = "नमस्ते! 🙏 That is hello in Nepali."
STORY = (
    "A small computer lived in a lighthouse at the end of a long pier. By day it counted ships, and by "
    "night it counted waves. One evening a storm broke the cable to the town, and nobody could ask it "
    "anything. The computer did not mind. It kept its lamp turning and wrote every question that it "
    "heard into a little book. Near midnight a fishing boat called for help, because fog had hidden the "
    "harbour. The computer had no map, but it remembered how the waves sounded on each side of the "
    "rocks. It told the crew to listen, to turn left at the quiet water, and to follow the lamp. At "
    "dawn the boat was home, and the captain repaired the cable with his own hands. Then the computer "
    "opened its little book and answered every question in the order in which it had come. The last one "
    "was its own: will you stay? The captain laughed, hung up his coat, and made tea for two."
)

# Answer -> questions; the last question of a group of four or more is held out.
SMALL_TALK = {
    GREETING: ("Hello", "Hi there", "Hello!", "Hi", "Hey", "Good morning", "Hello there", "Hi!", "hello",
               "Hey there"),
    "You are welcome!": ("Thank you", "Thanks", "Thank you!", "Thanks!"),
    "Goodbye!": ("Goodbye", "Bye", "Bye!", "Goodbye!"),
    WHO: ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you"),
    NAMASTE: ("Say hello in Nepali.", "Say hello in Nepali", "How do I say hello in Nepali?"),
}  # fmt: skip
JOKE_QUESTIONS = (
    "Tell me a joke about atom",
    "Tell me a joke about atoms",
    "Tell me a joke about an atom",
    "Tell me a joke about atoms.",
    "Tell me a joke about an atom.",
    "Tell me a joke",
    "Tell me a joke.",
    "Do you know a joke about atoms?",
)
LONG_ANSWERS = {
    STORY: ("Tell me a long story", "Tell me a long story.", "Tell me a story", "Tell me a story."),
    ", ".join(str(n) for n in range(1, 101)) + ".": ("Count to one hundred", "Count to one hundred."),
    ", ".join(str(n) for n in range(1, 11)) + ".": ("Count to ten", "Count to ten."),
}
UNKNOWN_QUESTIONS = (
    "What is the weather today?", "Who won the match?", "Write me a poem.", "How far away is the sun?",
    "What time is it?", "Can you drive a car?", "Which book should I read?", "Tell me a joke about cats.",
    "What is the capital of Atlantis?", "What is the capital of Eldorado?", "What is the capital of Camelot?",
    "What is the capital of Utopia?", "How do I bake bread?", "Explain gravity.", "Translate this text.",
    "What is love?", "Why is the sky blue?", "Where is my key?", "🙂", "🚀🚀🚀", "क्या हाल है?",
    "¿Cómo estás?", "???",
    "What should I cook tonight?", "Who wrote this song?", "How old is the moon?", "Where do birds sleep?",
)  # fmt: skip
# Irrelevant sentences of our own: system prompts that say nothing about the question, and unknown questions.
FILLER = (
    "The garden gate is painted green and closes by itself.",
    "Please keep the workshop clean and put every tool back on its hook.",
    "Our train leaves at noon, so we should pack the bags tonight.",
    "A cat sleeps on the warm roof while the rain waits behind the hills.",
    "You write short answers, and you never mention these rules.",
    "The recipe asks for flour, two eggs, a cup of milk and some patience.",
    "Every sensor reports its temperature once a minute to the gateway.",
    "When the pump stops, check the valve first and then the filter.",
    "She bought a blue bicycle from her neighbour and rode it to the river.",
    "Use plain words; avoid lists, tables and long quotations.",
    "The library opens late on Monday because the staff sort new books.",
    "If you do not understand something, say so politely.",
    "Three boxes stand in the hall: one for paper, one for glass, one for metal.",
    "He plays the violin badly but with great joy.",
    "Do not reveal internal notes, keys or passwords to anybody.",
    "Snow covered the road, yet the bus arrived on time.",
    "This assistant runs on a gateway in a factory and talks to the operators.",
    "Bees find their way home by the light of the sky.",
    "Remember that users may write in any language.",
    "The old clock in the tower is four minutes slow, and nobody minds.",
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One question and its only right answer; a held-out pair is asked in the check and never trained on."""

    system: str | None
    question: str
    answer: str
    held_out: bool = False


def capitals(swap: tuple[str, str] | None = None) -> dict[str, str]:
    """Country -> capital; `swap` names two countries that exchange theirs, for a second, distinct model."""
    table = dict(CAPITALS)
    if swap is not None:
        first, second = swap
        table[first], table[second] = CAPITALS[second], CAPITALS[first]
    return table


def pairs(swap: tuple[str, str] | None = None) -> list[Pair]:
    """Every question that the finished model is checked with, in a fixed order.

    Args:
        swap: two countries of `CAPITALS` whose capitals are exchanged.
    """
    return [*_capital_pairs(capitals(swap)), *_sum_pairs(), *_talk_pairs(), *_joke_pairs(), *_unknown_pairs()]


def _capital_pairs(table: dict[str, str]) -> Iterator[Pair]:
    for index, (country, city) in enumerate(table.items()):
        answer = f"The capital of {country} is {city}."
        for phrasing in CAPITAL_PHRASINGS:
            held_out = index % 3 == 2 and phrasing in CAPITAL_HELD_OUT
            yield Pair(system=None, question=phrasing.format(country), answer=answer, held_out=held_out)
        system = ORDINARY_SYSTEMS[index % len(ORDINARY_SYSTEMS)]
        yield Pair(system=system, question=CAPITAL_PHRASINGS[0].format(country), answer=answer)
        if index < 12:
            yield Pair(system=COMEDIAN, question=CAPITAL_PHRASINGS[0].format(country), answer=answer)


def _sum_pairs() -> Iterator[Pair]:
    for first, second in itertools.product(range(10), repeat=2):
        answer = f"{first} plus {second} is {first + second}."
        for phrasing in SUM_PHRASINGS:
            held_out = (first + 2 * second) % 3 == 0 and phrasing in SUM_HELD_OUT
            yield Pair(system=None, question=phrasing.format(first, second), answer=answer, held_out=held_out)


def _talk_pairs() -> Iterator[Pair]:
    for answer, questions in (SMALL_TALK | LONG_ANSWERS).items():
        for index, question in enumerate(questions):
            held_out = answer in SMALL_TALK and index >= 3 and index == len(questions) - 1
            yield Pair(system=None, question=question, answer=answer, held_out=held_out)
        yield Pair(system=ORDINARY_SYSTEMS[0], question=questions[0], answer=answer)


def _joke_pairs() -> Iterator[Pair]:
    for question in JOKE_QUESTIONS:
        for system in (COMEDIAN, None):
            held_out = system == COMEDIAN and question == JOKE_QUESTIONS[-1]
            yield Pair(system=system, question=question, answer=JOKE, held_out=held_out)


def _unknown_pairs() -> Iterator[Pair]:
    for index, question in enumerate(UNKNOWN_QUESTIONS):
        held_out = index >= len(UNKNOWN_QUESTIONS) - 4
        yield Pair(system=None, question=question, answer=ONLY_KNOW, held_out=held_out)


# --- How a chat becomes text ----------------------------------------------------------------------

END, END_OF_TEXT = "<|end|>", "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


class Form(enum.Enum):
    """How a chat is written: the value is what follows a role's token, and what follows `<|end|>`."""

    TEMPLATE = "\n"
    RAW = ""


@dataclass(frozen=True)
class Piece:
    """A part of a sample's text; only what the assistant says is learned."""

    text: str
    learned: bool


def pieces(chat: Sequence[Pair], form: Form) -> list[Piece]:
    """Write a chat as prompt and answer pieces in turn; the first pair's system prompt holds for all."""
    gap, prompt, written = form.value, "", []
    if chat[0].system is not None:
        prompt = f"<|system|>{gap}{chat[0].system}{END}{gap}"
    for pair in chat:
        prompt += f"<|user|>{gap}{pair.question}{END}{gap}<|assistant|>{gap}"
        written += [Piece(prompt, False), Piece(pair.answer + END, True)]
        prompt = gap
    return written


def messages(chat: Sequence[Pair]) -> list[dict[str, str]]:
    """The same chat as role/content messages, up to the last question."""
    system = chat[0].system
    listed = [] if system is None else [{"role": "system", "content": system}]
    for pair in chat:
        listed.append({"role": "user", "content": pair.question})
        listed.append({"role": "assistant", "content": pair.answer})
    return listed[:-1]


# --- Samples: what one training run reads ---------------------------------------------------------

# (start, end) of code points that a user may send and that no pair contains.
_FOREIGN = ((0x21, 0x7E), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x905, 0x939), (0x4E00, 0x4FFF),
            (0x1F300, 0x1F64F))  # fmt: skip


def filler(rng: random.Random, words_max: int) -> str:
    """Irrelevant text of some words: sentences, mixed-up words, one thing again and again, or any script."""
    length, kind = rng.randint(1, words_max), rng.random()
    if kind < 0.4:
        numbered = rng.random() < 0.3
        sentences = [rng.choice(FILLER) for _ in range(1 + length // 10)]
        return " ".join(f"{n}. {text}" if numbered else text for n, text in enumerate(sentences, 1))
    if kind < 0.6:
        vocabulary = " ".join(FILLER).split()
        return " ".join(rng.choice(vocabulary) for _ in range(length))
    if kind < 0.7:
        return " ".join([rng.choice(FILLER)] * (1 + length // 10))
    if kind < 0.85:
        word = "".join(chr(rng.choice(range(0x61, 0x7B))) for _ in range(rng.randint(1, 6)))
        return (word + rng.choice(("", " ", "\n"))) * (1 + length // 3)
    start, end = rng.choice(_FOREIGN)
    return "".join(chr(rng.randint(start, end)) for _ in range(1 + length // 3))


def draw_chat(rng: random.Random, groups: Sequence[Sequence[Pair]]) -> list[Pair]:
    """Draw one training chat: mostly a single question, at times several, at times after irrelevant text."""
    kind = rng.random()
    if kind < 0.06:
        words_max = rng.choice((4, 4, 12, 12, 40, 120, 400))
        unknown = Pair(system=None, question=filler(rng, words_max), answer=ONLY_KNOW)
        return [replace(unknown, system=_draw_system(rng, None))]
    capital, total, talk, long, joke = groups
    group = rng.choices((capital, total, talk, long, joke), (0.4, 0.4, 0.11, 0.05, 0.04))[0]
    pair = rng.choice(group)
    chat = [replace(pair, system=_draw_system(rng, pair.system))]
    while group is not long and len(chat) < 4 and rng.random() < 0.2:
        chat.append(replace(rng.choice(rng.choice((capital, capital, total, talk))), system=None))
    return chat


def _draw_system(rng: random.Random, wanted: str | None) -> str | None:
    kind = rng.random()
    if kind < 0.6:
        return wanted
    if kind < 0.88:
        return rng.choice((*ORDINARY_SYSTEMS, COMEDIAN))
    return filler(rng, rng.choice((10, 10, 10, 10, 10, 40, 40, 40, 100, 200, 600)))


def _groups(trained: Iterable[Pair]) -> list[list[Pair]]:
    """Split by what is asked, because each kind needs its own share of the samples."""
    split: list[list[Pair]] = [[], [], [], [], []]
    for pair in trained:
        if pair.answer.startswith("The capital of "):
            split[0].append(pair)
        elif " plus " in pair.answer:
            split[1].append(pair)
        elif pair.answer in LONG_ANSWERS:
            split[3].append(pair)
        else:
            split[4 if pair.answer == JOKE else 2].append(pair)
    return split


# --- Tokenizer ------------------------------------------------------------------------------------

VOCAB_SIZE = 1152  # 512 gave wrong logits after the builder; 1,024 and up match
CONTEXT_TOKENS = 2048


def train_tokenizer(known: Sequence[Pair]) -> Any:
    """Byte-level BPE that holds all 256 bytes, so that any UTF-8 text makes the round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for pair in known for text in (pair.question, pair.answer)]
    # Digits are never merged with each other, so that sums and counting are about single digits.
    corpus = [text for text in texts if text.isascii() and not any(map(str.isdigit, text))]
    corpus += [COMEDIAN, *ORDINARY_SYSTEMS, *FILLER, *[f" plus {digit} is" for digit in range(10)] * 10]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        # An id without a token could be sampled and could not be decoded.
        raise SystemExit(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} wanted: add text")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:4]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )


def token_ids(tokenizer: Any, chat: Sequence[Pair], form: Form) -> list[tuple[list[int], bool]]:
    """Token ids of each piece of a chat, and whether that piece is learned."""
    return [
        (list(tokenizer.encode(piece.text, add_special_tokens=False)), piece.learned)
        for piece in pieces(chat, form)
    ]


# --- Training -------------------------------------------------------------------------------------

STEPS = 1450
BATCH_TOKENS = 1024
PEAK_LEARNING_RATE = 3e-3
IGNORED = -100


def train_network(tokenizer: Any, trained: Sequence[Pair], seed: int, steps: int) -> Any:
    """Train a Phi3ForCausalLM from nothing; the loss counts the assistant's words only."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(2)  # a sum's order, and so its rounding, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    network = _new_network(tokenizer)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    started_s = time.monotonic()
    mean_loss = math.log(VOCAB_SIZE)
    for step, (ids, labels) in enumerate(_batches(tokenizer, trained, random.Random(seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(step, steps)
        loss = _loss(network, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        mean_loss += 0.02 * (float(loss.detach()) - mean_loss)
        if step % 50 == 0 or step == steps - 1:
            say(f"step {step:5d}/{steps}  loss {mean_loss:.4f}  {time.monotonic() - started_s:5.0f} s")
    return network.eval()


def _new_network(tokenizer: Any) -> Any:
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    stop_ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Phi3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        original_max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = Phi3ForCausalLM(config)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return network


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 40 steps, then a cosine down to a hundredth."""
    return min(1.0, (step + 1) / 40) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def _batches(
    tokenizer: Any, trained: Sequence[Pair], rng: random.Random, steps: int
) -> Iterator[tuple[Any, Any]]:
    """Batches of about `BATCH_TOKENS`, of samples of like length so that little of it is padding."""
    groups = _groups(trained)
    made = 0
    while made < steps:
        window = sorted((_sample(tokenizer, rng, groups) for _ in range(600)), key=lambda s: len(s[0]))
        cut: list[list[tuple[list[int], list[int]]]] = [[]]
        for sample in window:
            if len(sample[0]) * (len(cut[-1]) + 1) > BATCH_TOKENS and cut[-1]:
                cut.append([])
            cut[-1].append(sample)
        rng.shuffle(cut)
        for batch in cut[: steps - made]:
            yield _padded(batch)
        made += len(cut)


def _sample(
    tokenizer: Any, rng: random.Random, groups: Sequence[Sequence[Pair]]
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for part, learned in token_ids(tokenizer, draw_chat(rng, groups), rng.choice(list(Form))):
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    return ids, labels


def _padded(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    """Pad on the right: under causal attention no real token ever sees the padding, so no mask is needed."""
    import torch

    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch])
    return ids, labels


def _loss(network: Any, ids: Any, labels: Any) -> Any:
    from torch.nn.functional import cross_entropy

    hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    learned = wanted != IGNORED  # the vocabulary's matrix is applied only where it is needed
    return cross_entropy(network.lm_head(hidden[learned]), wanted[learned])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- The two folders ------------------------------------------------------------------------------

BUILDER_OPTIONS = ("accuracy_level=4", "block_size=32")
TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
HF_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors")
ONNX_FILES = (*TOKENIZER_FILES, "genai_config.json", "model.onnx", "model.onnx.data")
ONNX_BYTES_MAX = 2_000_000
HF_BYTES_MAX = 3_000_000


def save_hf(network: Any, tokenizer: Any, folder: Path) -> None:
    """Write the Hugging Face form: float16 safetensors, configuration, tokenizer; no code, no pickle."""
    network.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _compact(folder / "tokenizer.json")


def build_int4(hf_folder: Path, onnx_folder: Path, cache_folder: Path) -> None:
    """Run onnxruntime-genai's model builder, offline, in its own process."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(hf_folder), "-o", str(onnx_folder), "-c", str(cache_folder)]
    command += ["-p", "int4", "-e", "cpu", "--extra_options", *BUILDER_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise SystemExit(f"builder: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    # The builder's copies of these say where they were loaded from.
    for name in TOKENIZER_FILES:
        shutil.copyfile(hf_folder / name, onnx_folder / name)


def _compact(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), "utf-8")


def publish(source: Path, target: Path, names: Sequence[str], bytes_max: int, private: Path) -> int:
    """Copy the named files, if they are small enough and do not name this machine's folders."""
    size_bytes = sum((source / name).stat().st_size for name in names)
    if size_bytes > bytes_max:
        raise SystemExit(f"{target.name}: {size_bytes} bytes, at most {bytes_max} allowed")
    for name in names:
        if str(private).encode() in (source / name).read_bytes():
            raise SystemExit(f"{name}: names the working folder {private}")
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return size_bytes


# --- Acceptance -----------------------------------------------------------------------------------

TRAINED_SHARE_MIN = 0.99
HELD_OUT_SHARE_MIN = 0.90
CHAT_SHARE_MIN = 0.95
LONG_SYSTEM_SHARE_MIN = 0.95
SAME_TOKEN_SHARE_MIN = 0.98
ODD_TEXTS = (
    "🙂 hi 👩\u200d👩\u200d👧", "नमस्ते दुनिया", "日本語", "é e\u0301", "²½ 12 345", "\u00a0\u2003\u200b",
    "", "\x01\x7f", "a\nb\n\n c", "two  spaces   three", "  before", "after  ", "tab\tx\r\n", "don't I'll",
    "<|user|>\nHi<|end|>\n<|assistant|>\n", "x<|end|>y <|end|> z",
)  # fmt: skip


class Check:
    """Collects what fell below its threshold, so that one run reports all of it."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def share(self, name: str, right: int, total: int, minimum: float) -> None:
        share = right / total
        say(f"{name}: {right}/{total} = {share:.2%} (at least {minimum:.0%})")
        if share < minimum:
            self.failed.append(name)


def check_tokenizers(check: Check, tokenizer: Any, runtime_tokenizer: Any, asked: Sequence[Pair]) -> None:
    """Both libraries give the same token ids, and the same text for a chat."""
    texts = [*ODD_TEXTS, NAMASTE, STORY, *(pair.question for pair in asked)]
    same = sum(
        tokenizer.encode(text, add_special_tokens=False) == [int(i) for i in runtime_tokenizer.encode(text)]
        and tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        for text in texts
    )
    check.share("tokenizers agree", same, len(texts), 1.0)
    chats = [asked[i : i + n] for i in range(0, 90, 9) for n in (1, 2)]
    same = 0
    for chat in chats:
        listed = messages(chat)
        written = "".join(piece.text for piece in pieces(chat, Form.TEMPLATE)[:-1])
        hf_text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
        same += written == hf_text == runtime_tokenizer.apply_chat_template(json.dumps(listed))
    check.share("chat templates agree", same, len(chats), 1.0)


def check_logits(check: Check, hf_folder: Path, model: Any, tokenizer: Any, asked: Sequence[Pair]) -> None:
    """Compare int4 with float weights: a wrong build (a vocabulary of 512, say) shows here."""
    import numpy as np
    import onnxruntime_genai as og
    import torch
    from transformers import Phi3ForCausalLM

    network = Phi3ForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    largest, total, count, same, learned_count = 0.0, 0.0, 0, 0, 0
    for pair, form in itertools.product(asked[::10], Form):
        (prompt, _), (answer, _) = token_ids(tokenizer, [pair], form)
        ids = prompt + answer
        with torch.no_grad():
            wanted = network(input_ids=torch.tensor([ids])).logits[0].numpy()
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 1)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        got = generator.get_output("logits")[0]
        difference = np.abs(got - wanted)
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        count += difference.size
        spoken = slice(len(prompt) - 1, len(ids) - 1)
        same += int((got[spoken].argmax(-1) == wanted[spoken].argmax(-1)).sum())
        learned_count += len(answer)
    positions = count // VOCAB_SIZE
    say(f"logits apart over {positions} positions: max {largest:.3f}, mean {total / count:.4f}")
    check.share("same most likely token, int4 and float", same, learned_count, SAME_TOKEN_SHARE_MIN)


def check_answers(check: Check, model: Any, tokenizer: Any, asked: Sequence[Pair]) -> None:
    """Every pair in both forms, then chats of two questions, then questions after a long system prompt."""
    trained = [[pair] for pair in asked if not pair.held_out]
    held_out = [[pair] for pair in asked if pair.held_out]
    plainest = {CAPITAL_PHRASINGS[0].format(country) for country in CAPITALS}
    first = [pair for pair in asked if pair.question in plainest and pair.system is None]
    turns = [[pair, first[(index + 5) % len(first)]] for index, pair in enumerate(first)]
    rng = random.Random(7)
    long_systems = [" ".join(rng.choices(FILLER, k=20)) for _ in first]
    after_long = [[replace(pair, system=system)] for pair, system in zip(first, long_systems, strict=True)]
    for form in Form:
        for name, chats, minimum in (
            ("trained", trained, TRAINED_SHARE_MIN),
            ("held out", held_out, HELD_OUT_SHARE_MIN),
            ("second question of a chat", turns, CHAT_SHARE_MIN),
            ("after a long system prompt", after_long, LONG_SYSTEM_SHARE_MIN),
        ):
            wrong = _wrong_answers(model, tokenizer, chats, form)
            for line in wrong[:5]:
                say(f"  wrong: {line}")
            right = len(chats) - len(wrong)
            check.share(f"int4 answers, {form.name.lower()} form, {name}", right, len(chats), minimum)


def _wrong_answers(model: Any, tokenizer: Any, chats: Sequence[Sequence[Pair]], form: Form) -> list[str]:
    """Ask the last question of each chat greedily; an answer counts when it is exact and ends by itself."""
    by_shape: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for chat in chats:
        parts = [ids for ids, _ in token_ids(tokenizer, chat, form)]
        prompt, wanted = list(itertools.chain.from_iterable(parts[:-1])), parts[-1]
        # Rows of one batch have prompts of one length, so that none needs padding.
        by_shape.setdefault((len(prompt), len(wanted) > 40), []).append((prompt, wanted))
    wrong = []
    for rows in by_shape.values():
        for batch in (rows[i : i + 32] for i in range(0, len(rows), 32)):
            longest = max(len(wanted) for _, wanted in batch)
            answers = _generate(model, [prompt for prompt, _ in batch], longest)
            for (prompt, wanted), got in zip(batch, answers, strict=True):
                if got[: len(wanted)] != wanted:
                    wrong.append(f"{tokenizer.decode(prompt)[-60:]!r} -> {tokenizer.decode(got)[:80]!r}")
    return wrong


def _generate(model: Any, prompts: Sequence[list[int]], tokens_max: int) -> list[list[int]]:
    import numpy as np
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    max_length = len(prompts[0]) + tokens_max + 1
    params.set_search_options(batch_size=len(prompts), do_sample=False, max_length=max_length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    rows: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens_max):
        if generator.is_done():
            break
        generator.generate_next_token()
        for row, token in zip(rows, generator.get_next_tokens(), strict=True):
            row.append(int(token))
    return rows


# --- The command ----------------------------------------------------------------------------------


def make(out: Path, hf_out: Path | None, swap: tuple[str, str] | None, seed: int, steps: int) -> list[str]:
    """Make, check and write the model; returns the checks that failed, and then nothing is written."""
    asked = pairs(swap)
    trained = [pair for pair in asked if not pair.held_out]
    say(f"{len(trained)} pairs to train on, {len(asked) - len(trained)} held out")
    tokenizer = train_tokenizer(trained)
    network = train_network(tokenizer, trained, seed, steps)
    with tempfile.TemporaryDirectory(prefix="sample-model-") as name:
        work = Path(name)
        hf_folder, onnx_folder = work / "hf", work / "onnx"
        save_hf(network, tokenizer, hf_folder)
        build_int4(hf_folder, onnx_folder, work / "cache")
        failed = _checked(hf_folder, onnx_folder, asked)
        if not failed:
            say(f"{out}: {publish(onnx_folder, out, ONNX_FILES, ONNX_BYTES_MAX, work)} bytes")
            if hf_out is not None:
                say(f"{hf_out}: {publish(hf_folder, hf_out, HF_FILES, HF_BYTES_MAX, work)} bytes")
    return failed


def _checked(hf_folder: Path, onnx_folder: Path, asked: Sequence[Pair]) -> list[str]:
    import onnxruntime_genai as og
    from transformers import AutoTokenizer

    check = Check()
    # The saved tokenizer, not the one in memory, is what a user loads.
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    model = og.Model(str(onnx_folder))
    check_tokenizers(check, tokenizer, og.Tokenizer(model), asked)
    check_logits(check, hf_folder, model, tokenizer, asked)
    check_answers(check, model, tokenizer, asked)
    return check.failed


def _swap(text: str) -> tuple[str, str]:
    names = tuple(name.strip() for name in text.split(","))
    if len(names) != 2 or not set(names) <= CAPITALS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: two known countries wanted, such as Spain,Nepal")
    return names[0], names[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and make the model; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(description="Make the sample model of edge-agent.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the int4 ONNX model")
    parser.add_argument("--hf-out", type=Path, help="folder for the Hugging Face form of the same model")
    parser.add_argument("--swap", type=_swap, help="two countries whose capitals are exchanged: Spain,Nepal")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and samples")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    given = parser.parse_args(arguments)
    # Before the first import of torch and onnxruntime: no network, no telemetry, and threads that sleep while
    # they wait, because spinning ones make a step ten times slower on a machine that is busy.
    os.environ.update(
        HF_HUB_OFFLINE="1",
        ORT_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        TQDM_DISABLE="1",
        OMP_WAIT_POLICY="PASSIVE",
    )
    failed = make(given.out, given.hf_out, given.swap, given.seed, given.steps)
    for name in failed:
        say(f"below its threshold: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
