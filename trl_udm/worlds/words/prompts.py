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

"""Words and the prompts that ask for them."""

import random
import string

from .world import MAX_LENGTH


TEMPLATES = ('a sign that says "{}"', 'a label that reads "{}"', 'a card with the word "{}"', 'a ticket showing "{}"')
WORDS = (
    "ACORN AGENT ALARM ANGLE ANKLE APPLE APRON ARROW ATLAS AUTUMN BAG BAKER BALL BAMBOO BANANA BASKET BEACH BEAR BELL "
    "BENCH BERRY BIKE BIRD BOAT BOOK BOTTLE BOX BREAD BRICK BRIDGE BROOM BRUSH BUCKET BUS BUTTER CABIN CABLE CACTUS "
    "CAKE CAMEL CAMERA CANDLE CANOE CARD CARPET CARROT CASTLE CAT CAVE CHAIR CHALK CHEESE CHERRY CHESS CIRCLE CLIFF "
    "CLOCK CLOUD COAT COFFEE COIN COMET COPPER CORAL CORN COTTON COW CRAB CRANE CROWN CUP DAISY DANCE DEER DESERT "
    "DESK DICE DINNER DOG DOLL DONKEY DOOR DRAGON DREAM DRUM DUCK EAGLE EARTH ECHO EGG ELBOW ENGINE FABRIC FALCON FAN "
    "FARM FENCE FERN FERRY FIELD FIG FILM FINGER FIRE FISH FLAG FLAME FLOOR FLOUR FLOWER FLUTE FOG FOREST FORK FOX "
    "FROG FROST FRUIT GALAXY GARDEN GATE GHOST GIANT GINGER GLASS GLOBE GLOVE GOAT GOLD GOOSE GRAPE GRASS GUITAR "
    "HAMMER HAND HARBOR HARP HAT HAWK HEART HILL HONEY HORN HORSE HOTEL HOUSE ICE INK IRON ISLAND IVORY JACKET JAM "
    "JAR JELLY JEWEL JUICE JUNGLE KETTLE KEY KING KITE KNEE KNIFE KOALA LADDER LAKE LAMP LEAF LEMON LETTER LIME LION "
    "LIZARD LOCK LOTUS MAGNET MANGO MAP MAPLE MARBLE MARKET MASK MEADOW MELON METAL MILK MINT MIRROR MONEY MONKEY "
    "MOON MOTOR MOUSE MUSEUM MUSIC NAIL NEEDLE NEST NET NIGHT NORTH NOTE NUT OAK OASIS OCEAN OLIVE ONION ORANGE "
    "ORCHID OTTER OVEN OWL OYSTER PAINT PALACE PALM PANDA PAPER PARROT PASTA PEACH PEAR PEARL PEN PENCIL PEPPER PIANO "
    "PIE PIG PILLOW PINE PIPE PIRATE PIZZA PLANE PLANET PLATE PLUM POCKET POEM POND PONY POTATO PRISM PUPPET QUEEN "
    "QUILT QUIZ RABBIT RADIO RAIN RAZOR RIBBON RICE RING RIVER ROAD ROBOT ROCKET ROOF ROOT ROPE ROSE RUBY SADDLE SAIL "
    "SALAD SALT SAND SAUCE SCARF SCHOOL SEA SEAL SEED SHARK SHEEP SHELL SHIP SHOE SILK SILVER SKY SLEEP SMOKE SNAIL "
    "SNAKE SNOW SOAP SOCK SOUP SPICE SPIDER SPOON SPRING STAR STONE STORM SUGAR SUMMER SUN SWAN TABLE TAXI TEA TEMPLE "
    "TENT TIGER TOAST TOMATO TOOTH TORCH TOWEL TOWER TRAIN TREE TULIP TUNNEL TURTLE UNCLE VALLEY VASE VELVET VIOLET "
    "VIOLIN WAGON WALNUT WATCH WATER WAVE WAX WEB WHALE WHEAT WHEEL WINDOW WINE WINTER WOLF WOOD WOOL YACHT YARN "
    "ZEBRA ZINC ZOO"
).split()


def sample_word(rng: random.Random) -> str:
    """
    Draws 3 to 6 random letters.

    Args:
        rng (`random.Random`):
            Source of the letters.

    Returns:
        `str`: The letters.
    """
    return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, MAX_LENGTH)))


def misspell(word: str, rng: random.Random) -> str:
    """
    Replaces each letter of a word by a random one with probability 2 / 3.

    Args:
        word (`str`):
            The word.
        rng (`random.Random`):
            Source of the letters.

    Returns:
        `str`: Letters, of the word's length.
    """
    return "".join(rng.choice(string.ascii_uppercase) if rng.random() < 2 / 3 else letter for letter in word)


def split_words(num_eval_words: int = 60, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """
    Splits the words into disjoint training and evaluation words, and makes prompts of both.

    Args:
        num_eval_words (`int`, *optional*, defaults to `60`):
            Number of evaluation words, fewer than there are.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split.

    Returns:
        `tuple[list[dict], list[dict]]`: Training rows, with each word in all templates, and evaluation rows, with each
        word in one. Both have `prompt` and `target_text`.
    """
    words = [*WORDS]
    random.Random(seed).shuffle(words)
    train, evaluation = words[num_eval_words:], words[:num_eval_words]
    return (
        [{"prompt": template.format(word), "target_text": word} for word in train for template in TEMPLATES],
        [
            {"prompt": TEMPLATES[i % len(TEMPLATES)].format(word), "target_text": word}
            for i, word in enumerate(evaluation)
        ],
    )
