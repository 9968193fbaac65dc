"""Makes the demo's samples: instructions composed from templates and topics, responses written by
SmolLM2-135M-Instruct.

    python examples/make_demo_data.py [--output pocl_fast/run/demo_data]

Every template is filled with every topic of its list; the bundled teacher answers each instruction greedily; answers
that are cut, too long, repeat themselves or talk about the assistant are left out. Deterministic but for rounding;
about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from pathlib import Path

from pocl_fast.answers.decoding import generate
from pocl_fast.data.encoding import SampleEncoder
from pocl_fast.models import loading
from pocl_fast.models.placement import choose_device
from pocl_fast.models.precision import choose_precision
from pocl_fast.records.samples import Sample
from pocl_fast.system.console import progress_bar

TRAIN, DEV = 448, 120
MAX_NEW_TOKENS, FEWEST_WORDS, MOST_WORDS = 40, 1, 28

THINGS = (
    "a bicycle|an umbrella|a candle|a mirror|a telescope|a compass|a hammer|a library|a bridge|a lighthouse|a microscope|a clock|"
    "a violin|a tent|a map|a refrigerator|a camera|a kite|a ladder|a thermometer|a wheel|a battery|a lamp|a submarine|a greenhouse|"
    "a windmill|a passport|a dictionary|a calendar|a backpack|a whistle|an anchor|a magnet|a helmet|a keyboard"
)
ANIMALS = (
    "a dolphin|an owl|a penguin|an elephant|a bee|a spider|a camel|a whale|a bat|a kangaroo|a tortoise|an eagle|a wolf|an octopus|"
    "a butterfly|a horse|a frog|a giraffe|an ant|a salmon|a parrot|a bear|a rabbit|a lion|a fox"
)
SUBJECTS = (
    "gravity|photosynthesis|evaporation|democracy|inflation|recycling|friendship|erosion|electricity|migration|climate|honesty|"
    "architecture|nutrition|biology|geography|history|astronomy|volcanoes|earthquakes|rainbows|tides|vaccines|energy|poetry|music|"
    "mathematics|economics|philosophy|justice|courage|patience|agriculture|engineering|medicine|language|culture|exercise|sleep|memory"
)
ADJECTIVES = (
    "hot|happy|big|fast|dark|heavy|early|strong|clean|loud|empty|soft|expensive|dangerous|ancient|brave|dry|deep|simple|wide|"
    "generous|sharp|smooth|thick|narrow|polite|quiet|rich|bitter|bright"
)
VERBS = "begin|build|help|find|love|win|buy|open|push|arrive|remember|accept|increase|laugh|create|teach|forget|enter|agree|repair"
PLACES = (
    "France|Italy|Japan|Spain|Germany|Egypt|Canada|India|China|Greece|Russia|Portugal|Kenya|Peru|Norway|Sweden|Ireland|Cuba|"
    "Thailand|Poland|Austria|Finland|Mexico|Argentina|England"
)
JOBS = (
    "a teacher|a doctor|a firefighter|a pilot|a farmer|a baker|a carpenter|a journalist|a nurse|a chef|an architect|a librarian|"
    "a mechanic|a lawyer|a scientist|a musician|a gardener|a dentist|a plumber|an astronaut"
)
HABITS = (
    "sleep better|learn a new language|save money|stay healthy|make new friends|read more books|reduce stress|cook at home|"
    "wake up early|stay focused at work|drink more water|write better emails|prepare for an exam|protect the environment|"
    "keep a house clean|grow tomatoes|start running|speak in public|manage time well|save electricity"
)
SENTENCES = (
    "The movie was wonderful and I would watch it again.|The food was cold and the waiter was rude.|I love the color of this new jacket.|"
    "The battery died after only one hour.|Our teacher explained the lesson very clearly.|The hotel room was dirty and smelled bad.|"
    "This book kept me awake all night because it was so good.|The train was late again and nobody told us why.|"
    "My new phone works perfectly.|The concert was the best night of my life.|The soup had no taste at all.|"
    "The staff was friendly and helpful.|I regret buying these shoes.|The view from the window was beautiful.|"
    "The game crashes every time I open it.|She gave me great advice.|The package arrived broken.|The park is clean and peaceful.|"
    "The meeting was long and boring.|This cake is delicious."
)
STORIES = (
    "Tom planted a small tree behind his house. Every day he gave it water. After ten years it was taller than the roof.|"
    "The city closed the old bridge for repairs. Drivers must use the tunnel until June. The work will cost two million dollars.|"
    "Bees visit flowers to collect nectar. While they fly, they carry pollen from plant to plant. Without them many fruits would not grow.|"
    "Maria lost her keys on Monday. She searched the whole house. In the end her dog brought them to her.|"
    "The library now opens on Sundays. Students asked for it for years. The first Sunday brought three hundred visitors.|"
    "A storm hit the coast last night. It broke many windows. No one was hurt.|"
    "The small bakery sells bread every morning. People wait in line before sunrise. By noon everything is sold.|"
    "Scientists found a new kind of frog in the forest. It is smaller than a coin. It lives under wet leaves.|"
    "Anna wanted to learn the guitar. She practiced an hour each day. A year later she played her first concert.|"
    "The school built a garden. Children grow carrots and beans there. They eat them for lunch."
)
STATEMENTS = (
    "The dog chased the cat.|She writes a letter every week.|They are building a new house.|We enjoyed the long walk.|"
    "He fixed the broken chair.|The children sing a song.|I forgot my umbrella.|The farmer feeds the animals.|The sun warms the sand.|"
    "My sister paints pictures.|The old man tells stories.|Our team won the match.|The baker makes fresh bread.|The girl reads a book.|"
    "The boys play football.|He drinks coffee in the morning.|The river flows to the sea.|She closes the window."
)

# (template, input template, topics): {} is the topic
TEMPLATES = [
    ("In one short sentence, explain what {} is used for.", "", THINGS),
    ("In one short sentence, describe {}.", "", THINGS + "|" + ANIMALS),
    ("Write one sentence about {} for a young child.", "", ANIMALS + "|" + SUBJECTS),
    ("Name one interesting fact about {} in one short sentence.", "", ANIMALS),
    ("Where does {} usually live? Answer in one short sentence.", "", ANIMALS),
    ("What does {} eat? Answer in one short sentence.", "", ANIMALS),
    ("In one short sentence, define {}.", "", SUBJECTS),
    ("In one sentence, explain why {} is important.", "", SUBJECTS),
    ("Write a short title for an essay about {}.", "", SUBJECTS + "|" + ANIMALS),
    ("Give one example of {} in everyday life, in one short sentence.", "", SUBJECTS),
    ("What is the opposite of the word '{}'? Answer with one word.", "", ADJECTIVES + "|" + VERBS),
    ("Give one synonym of the word '{}'. Answer with one word.", "", ADJECTIVES + "|" + VERBS),
    ("Use the word '{}' in one short sentence.", "", ADJECTIVES + "|" + VERBS),
    ("What is the capital of {}? Answer in one short sentence.", "", PLACES),
    ("On which continent is {}? Answer in one short sentence.", "", PLACES),
    ("Which language do people speak in {}? Answer in one short sentence.", "", PLACES),
    ("Name one famous food from {} in one short sentence.", "", PLACES),
    ("In one short sentence, say what {} does at work.", "", JOBS),
    ("Name one tool that {} uses, in one short sentence.", "", JOBS),
    ("In one sentence, say why someone may want to become {}.", "", JOBS),
    ("Give one short piece of advice on how to {}.", "", HABITS),
    ("In one sentence, say why it is good to {}.", "", HABITS),
    ("Write one encouraging sentence for someone who wants to {}.", "", HABITS),
    ("What is {} often made of? Answer in one short sentence.", "", THINGS),
    ("Who might need {}? Answer in one short sentence.", "", THINGS),
    ("Write the first sentence of a story about {}.", "", THINGS + "|" + ANIMALS),
    ("What does {} look like? Answer in one short sentence.", "", THINGS + "|" + ANIMALS),
    ("In one short sentence, say how {} moves.", "", ANIMALS),
    ("Ask one question about {}.", "", SUBJECTS + "|" + ANIMALS + "|" + PLACES),
    ("In one sentence, say what {} is known for.", "", PLACES),
    ("Write one sentence that a traveler could say about {}.", "", PLACES),
    ("In one sentence, say what people learn when they study {}.", "", SUBJECTS),
    ("Write a slogan of at most eight words about {}.", "", SUBJECTS + "|" + THINGS),
    ("Which skill does {} need most? Answer in one short sentence.", "", JOBS),
    ("Where does {} work? Answer in one short sentence.", "", JOBS),
    ("Explain the word '{}' in one short sentence.", "", ADJECTIVES + "|" + VERBS),
    ("In one sentence, say why people like {}.", "", THINGS + "|" + ANIMALS + "|" + SUBJECTS),
    ("What would change without {}? Answer in one short sentence.", "", SUBJECTS + "|" + THINGS),
    ("Who or what acts in the following sentence? Answer with one or two words.", "{}", STATEMENTS),
    ("Add one adjective to the following sentence.", "{}", STATEMENTS),
    ("Continue the following text with one short sentence.", "{}", STORIES + "|" + SENTENCES + "|" + STATEMENTS),
    ("Is the following sentence positive or negative? Answer with one word.", "{}", SENTENCES),
    ("Rewrite the following sentence in other words.", "{}", SENTENCES + "|" + STATEMENTS),
    ("Rewrite the following sentence in the past tense.", "{}", STATEMENTS),
    ("Turn the following sentence into a question.", "{}", STATEMENTS),
    ("Summarize the following text in one short sentence.", "{}", STORIES),
    ("Write a short title for the following text.", "{}", STORIES),
    ("Who or what is the following text about? Answer in one short sentence.", "{}", STORIES),
]
TALK = re.compile(
    r"as an ai|i'm sorry|i am sorry|i cannot|i can't|language model|smollm|hugging face|here is|here's|sure|certainly",
    re.I,
)


def compose() -> list[dict[str, str]]:
    """Every template with every topic, once, shuffled."""
    made = [
        {"instruction": template if given else template.format(topic), "input": given.format(topic)}
        for template, given, topics in TEMPLATES
        for topic in topics.split("|")
    ]
    random.Random(0).shuffle(made)
    return made


def acceptable(answer: str, ended: bool) -> bool:
    """Whether an answer ended by itself, is short plain text, and neither repeats itself nor talks about the
    assistant."""
    words = answer.lower().split()
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return (
        ended
        and FEWEST_WORDS <= len(words) <= MOST_WORDS
        and answer.isascii()
        and not re.search(r"[\n*#`<>\[\]]", answer)
        and not TALK.search(answer)
        and len(set(threes)) == len(threes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "pocl_fast/run/demo_data"
    )
    output = parser.parse_args().output
    start = time.perf_counter()
    device = choose_device("auto")
    choose_precision("auto", device)
    encoder = SampleEncoder(loading.load_tokenizer(loading.BUNDLED))
    teacher = loading.load_model(loading.BUNDLED, device=device)
    records = compose()
    prompts = [encoder.encode_prompt(as_sample(record)) for record in records]
    with progress_bar(len(records), "answers", "prompts") as bar:
        answers = generate(
            teacher,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            end_ids=encoder.end_ids,
            pad_id=encoder.tokenizer.pad_token_id,
            batch_size=96,
            progress=bar.update,
        )
    kept, seen = [], set()
    for record, answer in zip(records, answers, strict=True):
        text = encoder.tokenizer.decode(answer, skip_special_tokens=True).strip()
        if acceptable(text, ended=len(answer) < MAX_NEW_TOKENS) and (len(text) < 30 or text not in seen):
            seen.add(text)
            kept.append({**record, "output": text})
    print(f"{len(records)} instructions, {len(kept)} acceptable answers, {time.perf_counter() - start:.0f} s")
    if len(kept) < TRAIN + DEV:
        raise SystemExit(f"{TRAIN + DEV} are needed: add templates or topics")
    write(output / "demo.dev.jsonl", kept[:DEV])
    write(output / "demo.train.jsonl", kept[DEV : DEV + TRAIN])


def as_sample(record: dict[str, str]) -> Sample:
    content = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
    return Sample(0, 0, ({"role": "user", "content": content},), ("",))


def write(path: Path, records: list[dict[str, str]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)
    print(f"{path}: {len(records)} samples, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
