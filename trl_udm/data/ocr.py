# Copyright 2026 The trl-udm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Prompts that quote a text to be written: a generator of training prompts."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence

from datasets import Dataset, Features, Value

from ..rewards.ocr import extract_target, normalize_text


OCR_FEATURES = Features({"prompt": Value("string"), "target_text": Value("string")})

_ADJECTIVES = (
    "Amber Ancient Autumn Big Blue Brave Bright Broken Calm Clever Coastal Copper Cosmic Crimson Daily Distant Double "
    "Early Electric Emerald Endless Fresh Frozen Gentle Giant Golden Grand Happy Hidden Hollow Honest Icy Indigo Iron "
    "Ivory Jolly Last Little Lonely Lucky Magic Midnight Mighty Modern Northern Old Paper Quiet Rapid Royal Rusty "
    "Secret Silent Silver Simple Sleepy Smoky Southern Spicy Stormy Sunny Sweet Tiny Urban Velvet Vintage Warm "
    "Western Wild Winter Wonder Yellow"
).split()
_NOUNS = (
    "Academy Airport Anchor Arcade Archive Bakery Balloon Bank Barber Beach Bicycle Books Bridge Brothers Cafe Canyon "
    "Castle Ceramics Cinema Circus Clinic Club Coffee Comet Compass Corner Dream Engine Express Factory Falcon Farm "
    "Ferry Festival Field Fountain Fox Galaxy Gallery Garage Garden Gate Harbor Horizon Hotel Island Journal Jungle "
    "Kitchen Lantern Library Lighthouse Market Meadow Mill Mountain Museum Music Night Noodles Observatory Orchard "
    "Palace Park Pharmacy Piano Pizza Planet Poetry Post Radio Railway River Robot Rocket School Ship Station Storm "
    "Studio Tea Theatre Tiger Tower Toys Travel Valley Village Voyage Weekly Whale Window Workshop Zoo"
).split()
_NOTICES = (
    "Back Soon",
    "Beware of the Dog",
    "Buy One Get One Free",
    "Closed on Sundays",
    "Do Not Disturb",
    "Do Not Feed the Ducks",
    "Employees Only",
    "Exit",
    "Fresh Bread Daily",
    "Gone Fishing",
    "Happy Birthday",
    "Keep Left",
    "Keep Off the Grass",
    "Last Call",
    "Mind Your Head",
    "No Parking",
    "No Swimming Today",
    "Now Hiring",
    "Open Late",
    "Please Ring the Bell",
    "Please Take a Seat",
    "Pull",
    "Push",
    "Quiet Please",
    "Sale Ends Friday",
    "Slow Down",
    "Sold Out",
    "Thank You for Your Visit",
    "Tickets Sold Here",
    "Wait Here",
    "Watch Your Step",
    "Welcome Home",
    "Wet Paint",
    "Will You Marry Me",
)
_NUMBERED = ("Bus", "Chapter", "Dock", "Exit", "Floor", "Gate", "Lane", "Level", "Locker", "Platform", "Room", "Route")

_SURFACES = (
    "A billboard",
    "A birthday cake",
    "A book cover",
    "A brass plaque",
    "A cardboard sign",
    "A chalkboard",
    "A cinema marquee",
    "A coffee mug",
    "A concert poster",
    "A cotton tote bag",
    "A framed print",
    "A garden gate",
    "A glass door",
    "A graffiti wall",
    "A handwritten note",
    "A hanging banner",
    "A leather notebook",
    "A magazine cover",
    "A metal street sign",
    "A neon sign",
    "A newspaper front page",
    "A paper cup",
    "A postcard",
    "A robot's screen",
    "A shop window",
    "A stone arch",
    "A T-shirt",
    "A train carriage",
    "A vintage label",
    "A wooden signpost",
)
_VERBS = ("that says", "that reads", "with the words", "showing the text")
_SETTINGS = (
    "",
    " against a plain white wall",
    " among tall sunflowers",
    " at dusk, with street lamps coming on",
    " beside a calm lake",
    " by candlelight",
    " drawn in watercolor",
    " in a busy market",
    " in a cozy kitchen",
    " in a foggy forest",
    " in a photograph with shallow depth of field",
    " in a snowy village",
    " in bright midday sun",
    " in the style of a comic",
    " on a rainy city street",
    " on a sandy beach",
    " on the deck of a ship",
    " photographed from below",
    " seen through a window",
    " under a starry sky",
)


def generate_ocr_prompts(
    num_prompts: int,
    texts: Sequence[str] | None = None,
    exclude: Iterable[str | Mapping[str, str]] = (),
    seed: int = 0,
) -> Dataset:
    """
    Draws training prompts that quote a text to be written, such as 'A neon sign that says "Quiet Harbor" by
    candlelight'.

    A prompt is a text in one of 2,400 templates. The texts are all different until none is left. Then they are
    repeated in other templates.

    Args:
        num_prompts (`int`):
            Number of prompts.
        texts (`Sequence[str]`, *optional*):
            Texts to quote, without double quotes. By default 23,594 texts of one to five words, some with a number.
        exclude (`Iterable[str | Mapping[str, str]]`, *optional*):
            Prompts, or rows with `prompt` and `target_text`, whose texts must not be quoted. Texts that are equal for
            [`OCRReward`] are not quoted either.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice and the order. A longer dataset begins with the shorter one of the same seed.

    Returns:
        [`~datasets.Dataset`]: With the columns `prompt` and `target_text`.

    Raises:
        ValueError: If `num_prompts` is not in `[1, 2400 * number of texts]`, a text is blank or has a double quote, or
            a prompt in `exclude` quotes no text.

    Example:

    ```python
    >>> from trl_udm.data.ocr import generate_ocr_prompts

    >>> dataset = generate_ocr_prompts(2, texts=["Hi", "OK"])
    >>> sorted(dataset["target_text"])
    ['Hi', 'OK']
    ```
    """
    if texts is None:
        texts = [
            *_NOUNS,
            *_NOTICES,
            *(f"{adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES, _NOUNS)),
            *(f"The {adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES, _NOUNS)),
            *(f"{first} and {second}" for first, second in itertools.permutations(_NOUNS, 2)),
            *(f"{noun} {number}" for noun, number in itertools.product(_NUMBERED, range(1, 100))),
        ]
    for text in texts:
        if not text.strip() or '"' in text:
            raise ValueError(f"`texts` must hold texts that are not blank, without double quotes, got {text!r}.")

    excluded = set()
    for item in exclude:
        target = extract_target(item) if isinstance(item, str) else item["target_text"]
        excluded.add(normalize_text(target))
    texts = [text for text in dict.fromkeys(texts) if normalize_text(text) not in excluded]
    templates = list(itertools.product(_SURFACES, _VERBS, _SETTINGS))
    if not 1 <= num_prompts <= len(texts) * len(templates):
        raise ValueError(
            f"`num_prompts` must be in [1, {len(texts) * len(templates)}], got {num_prompts}: `exclude` leaves "
            f"{len(texts)} texts for {len(templates)} templates. Give more `texts`."
        )

    rng = random.Random(seed)
    rng.shuffle(texts)
    rng.shuffle(templates)
    starts = [rng.randrange(len(templates)) for _ in texts]
    rows = []
    for number in range(num_prompts):
        repeat, i = divmod(number, len(texts))
        surface, verb, setting = templates[(starts[i] + repeat) % len(templates)]
        rows.append({"prompt": f'{surface} {verb} "{texts[i]}"{setting}', "target_text": texts[i]})
    return Dataset.from_list(rows, features=OCR_FEATURES)
