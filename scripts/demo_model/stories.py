"""Stories and poems from a grammar: somebody, somewhere, has a problem, meets a helper, and it ends well.

A plot's lines hold choices, [this|that], and slots. Slots of the hero: {name}, {he}, {him}, {his}, and with a capital
letter {He}, {His}; of the helper: {helper} ("an old owl"), {helper_cap} ("An old owl"), {the_helper} ("the owl"); of the thing:
{item} ("silver key"), {a_item} ("a silver key").
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from facts import marked_blocks, words

WORDS = words()
PLOTS = marked_blocks("plots")
POEMS = marked_blocks("poems")
PLACES = {line.split(":")[0].strip(): [p.strip() for p in line.split(":")[1].split(";")] for line in WORDS["places"]}
ADJECTIVES = ("small", "gentle", "quiet", "golden", "happy", "secret", "merry", "friendly", "silver", "sleepy")
OBJECTIVE = {"he": "him", "she": "her"}
POSSESSIVE = {"he": "his", "she": "her"}
OPENINGS = (
    "Once upon a time, {there} was {a_trait} {hero} named {name} who lived {place}.",
    "Once upon a time {a_trait} {hero} named {name} lived {place}.",
    "{Place} there lived {a_trait} {hero} called {name}.",
    "There once was {a_hero} named {name}. {He} was {trait} and lived {place}.",
    "Long ago, {place}, there lived {a_trait} {hero}. {His} name was {name}.",
    "{name} was {a_trait} {hero} who lived {place}.",
)


@dataclass(slots=True)
class Wish:
    """What somebody asked a story to be about; empty fields are free."""

    hero: str = ""
    name: str = ""
    place: str = ""
    item: str = ""
    helper: str = ""
    theme: str = ""


@dataclass(slots=True)
class Story:
    """A story and what one may ask about it afterwards."""

    text: str
    name: str
    hero: str
    pronoun: str
    place: str
    helper: str
    moral: str
    theme: str


def article(noun: str) -> str:
    """Returns: the noun with "a" or "an" before it."""
    is_vowel = noun.lower().startswith(("a", "e", "i", "o", "u", "honest")) and not noun.lower().startswith(("uni", "one"))
    return ("an " if is_vowel else "a ") + noun


def choose(text: str, rng: random.Random) -> str:
    """Returns: the text with one part of each [a|b] left."""
    return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), text)


def capital(text: str) -> str:
    """Returns: the text with a capital first letter."""
    return text[0].upper() + text[1:]


def fits(plot: tuple[list[str], list[str]], wish: Wish) -> bool:
    """Whether a plot can use what was wished for."""
    themes, lines = plot
    body = " ".join(lines)
    if wish.theme and wish.theme not in themes:
        return False
    return not (wish.item and "item}" not in body)


def pick_hero(wish: Wish, rng: random.Random) -> tuple[str, str, str]:
    """Returns: (species, name, pronoun); a wished name decides the pronoun."""
    species = wish.hero or rng.choice(WORDS["animals"] if rng.random() < 0.7 else WORDS["people"])
    fixed = {"girl": "she", "princess": "she", "queen": "she", "witch": "she", "mermaid": "she", "cow": "she", "hen": "she"}
    fixed |= {"boy": "he", "prince": "he", "king": "he", "wizard": "he"}
    pronoun = fixed.get(species, rng.choice(("he", "she")))
    if wish.name:
        pronoun = "he" if wish.name in WORDS["he_names"] else "she"
    return species, wish.name or rng.choice(WORDS[f"{pronoun}_names"]), pronoun


def tell(rng: random.Random, wish: Wish | None = None) -> Story:
    """Returns: one story of six to twelve sentences that fulfils the wish."""
    wish = wish or Wish()
    fitting = [p for p in PLOTS if fits(p, wish)]
    about_it = [p for p in fitting if {wish.place, wish.hero} & set(p[0])]
    # a story about a lighthouse had better be about its light
    plot = rng.choice(about_it if about_it and rng.random() < 0.7 else fitting)
    species, name, pronoun = pick_hero(wish, rng)
    helper = wish.helper or rng.choice([a for a in WORDS["animals"] if a != species])
    trait, helper_trait = rng.sample(WORDS["traits"], 2)
    place = rng.choice(PLACES[wish.place] if wish.place else rng.choice(list(PLACES.values())))
    item = wish.item or rng.choice(WORDS["items"])
    described = f"{helper_trait} {helper}"
    slots = {
        "name": name, "he": pronoun, "him": OBJECTIVE[pronoun], "his": POSSESSIVE[pronoun], "He": pronoun.capitalize(),
        "His": POSSESSIVE[pronoun].capitalize(), "hero": species, "a_hero": article(species), "trait": trait, "there": "there",
        "a_trait": article(trait), "place": place, "Place": capital(place), "item": item, "a_item": article(item),
        "helper": article(described), "helper_cap": capital(article(described)), "the_helper": f"the {helper}",
    }
    body = [line for line in plot[1] if not line.startswith("=")]
    moral = rng.choice([line[1:].strip() for line in plot[1] if line.startswith("=")])
    lines = [rng.choice(OPENINGS), *body, moral]
    # a sentence may begin with "the owl": capitals after the slots are filled
    filled = [re.sub(r'(^|[.!?]"? )(the )', lambda m: m[1] + "The ", choose(line, rng).format(**slots)) for line in lines]
    return Story(" ".join(filled), name, species, pronoun, place, helper, filled[-1], plot[0][0])


def tell_another(before: Story, rng: random.Random) -> Story:
    """Returns: a story that differs from the one before in plot, hero and name."""
    while True:
        story = tell(rng)
        if story.theme != before.theme and story.hero != before.hero and story.name != before.name:
            return story


def story_wish(rng: random.Random) -> tuple[str, Wish]:
    """Returns: a request for a story as somebody may type it, and what it asks for."""
    hero = rng.choice(WORDS["animals"] + WORDS["people"])
    other = rng.choice([a for a in WORDS["animals"] if a != hero])
    place, item = rng.choice(list(PLACES)), rng.choice(WORDS["items"])
    theme = rng.choice(rng.choice(PLOTS)[0])
    name = rng.choice(WORDS["he_names"] + WORDS["she_names"])
    ask = rng.choice((
        "Tell me a story", "Tell me a short story", "Write a story", "Write a short story", "Can you tell me a story", "Tell a story",
        "tell me a little story", "Please tell me a story", "I would like a story", "Give me a story", "a story", "Make up a story",
        "tell me a bedtime story", "Could you write a story", "I want to hear a story", "Tell me another story",
    ))
    a_hero = article(hero)
    options = (
        ("", Wish()),
        ("", Wish()),
        (f" about {a_hero}", Wish(hero=hero)),
        (f" about {a_hero} and {article(place)}", Wish(hero=hero, place=place)),
        (f" about {a_hero} and {article(place)}", Wish(hero=hero, place=place)),
        (f" with {a_hero} and {article(place)}", Wish(hero=hero, place=place)),
        (f" about {article(place)}", Wish(place=place)),
        (f" about {a_hero} and {article(item)}", Wish(hero=hero, item=item)),
        (f" about {article(item)}", Wish(item=item)),
        (f" about {a_hero} and {article(other)}", Wish(hero=hero, helper=other)),
        (f" about {a_hero} who meets {article(other)}", Wish(hero=hero, helper=other)),
        (f" about {a_hero} named {name}", Wish(hero=hero, name=name)),
        (f" about {name}", Wish(name=name)),
        (f" about {name} the {hero}", Wish(hero=hero, name=name)),
        (f" about {theme}", Wish(theme=theme)),
        (f" about {a_hero} and {theme}", Wish(hero=hero, theme=theme)),
    )
    words_, wish = rng.choice(options)
    return ask + words_ + rng.choice(("", ".", ".", "?" if ask.startswith(("Can", "Could")) else ".")), wish


def story_questions(story: Story, rng: random.Random) -> list[tuple[str, str]]:
    """Returns: questions about a story that was just told, with their answers, in random order."""
    him = OBJECTIVE[story.pronoun]
    hero, name = story.hero, story.name
    pairs = [
        (rng.choice((f"What was the name of the {hero}?", f"What was the {hero}'s name?", "what was the name", "Who is the hero of the story?", f"what is the {hero} called")),
         f"The {hero}'s name was {name}."),
        (rng.choice((f"Where did {name} live?", f"Where did the {hero} live?", f"where did {story.pronoun} live")), f"{name} lived {story.place}."),
        (rng.choice((f"Who helped {name}?", f"Who helped the {hero}?", f"who helped {him}", "Who else is in the story?")),
         f"It was {article(story.helper)}."),
        (rng.choice(("What happened at the end?", "How did it end?", "how does the story end", "What is the ending?")), story.moral),
        (rng.choice(("Who is the story about?", "what is the story about", "What was it about?")), f"It is about {article(hero)} named {name} who lived {story.place}."),
    ]
    rng.shuffle(pairs)
    return pairs


def poem(rng: random.Random, subject: str = "") -> tuple[str, str]:
    """Returns: (subject, poem); a subject without a poem of its own gets one that fits everything."""
    nouns = WORDS["animals"] + WORDS["people"] + list(PLACES) + WORDS["items"]
    if not subject:
        own = [s for subjects, _ in POEMS for s in subjects if s != "any"]
        subject = rng.choice(own) if rng.random() < 0.5 else article(rng.choice(nouns))
    fitting = [lines for subjects, lines in POEMS if subject in subjects] or [lines for subjects, lines in POEMS if "any" in subjects]
    thing = re.sub(r"^(a|an|the|my) ", "", subject)
    text = "\n".join(rng.choice(fitting)).format(thing=thing, adj=rng.choice([a for a in ADJECTIVES if a not in thing]))
    return subject, text.replace("A old", "An old")


def poem_request(rng: random.Random) -> tuple[str, str]:
    """Returns: a request for a poem, and the poem."""
    if rng.random() < 0.15:
        plain = ("Write a poem", "Write a short poem.", "Give me a poem", "A poem, please", "tell me a poem", "Can you write a poem?", "another poem")
        return rng.choice(plain), poem(rng, rng.choice([s for subjects, _ in POEMS for s in subjects if s != "any"]))[1]
    subject, text = poem(rng)
    ask = ("Write a poem about {}", "Write a short poem about {}.", "write me a poem about {}", "A poem about {}, please", "Can you write a poem about {}?", "poem about {}", "Give me a short poem about {}", "Write a few lines about {} in verse", "compose a poem about {}", "I would like a poem about {}.")
    return rng.choice(ask).format(subject), text
