"""Small stories from a grammar: somebody, somewhere, wants something, meets a problem, is helped, and learns something."""

from __future__ import annotations

import random

HEROES = (
    ("fox", "he"), ("rabbit", "she"), ("owl", "she"), ("bear", "he"), ("mouse", "she"), ("hedgehog", "he"), ("cat", "she"), ("dog", "he"),
    ("turtle", "he"), ("robot", "it"), ("dragon", "she"), ("girl", "she"), ("boy", "he"), ("otter", "he"), ("crow", "he"), ("whale", "she"),
    ("badger", "he"), ("squirrel", "she"), ("frog", "he"), ("goose", "she"), ("deer", "she"), ("wolf", "he"), ("bee", "she"), ("snail", "he"),
)
NAMES = {
    "he": ("Tom", "Leo", "Max", "Finn", "Oskar", "Pip", "Bruno", "Hugo", "Milo", "Otto", "Sam", "Ben", "Theo", "Gus", "Jonas"),
    "she": ("Mia", "Lily", "Ella", "Nora", "Ada", "Ruby", "Clara", "Ivy", "Luna", "Greta", "Wren", "Hazel", "Emma", "Rosa", "Tilda"),
    "it": ("Bit", "Cog", "Spark", "Dot", "Bolt", "Tick"),
}
TRAITS = ("small", "curious", "brave", "shy", "clever", "quiet", "cheerful", "patient", "dreamy", "gentle", "stubborn", "kind")
PLACES = (
    "near a lighthouse", "at the edge of a forest", "by a wide river", "on a green hill", "in an old library", "beside a mill", "in a quiet village",
    "on a small island", "under a great oak", "in a town of clocks", "behind a waterfall", "in a garden of stones", "at the foot of a mountain",
)
ITEMS = (
    "lantern", "silver key", "red kite", "small boat", "golden bell", "blue scarf", "wooden flute", "paper map", "brass compass", "warm blanket",
    "jar of honey", "music box", "glass star", "old book", "pocket watch",
)
PROBLEMS = (
    ("a storm came up and the path was lost in the rain", "the storm"), ("the {item} fell into the river", "the river"),
    ("a thick fog rolled in and nobody could see the way", "the fog"), ("the bridge was broken", "the broken bridge"),
    ("night fell sooner than expected", "the dark"), ("a gate was locked and no one had the key", "the gate"),
    ("the wind carried the {item} high into a tree", "the tall tree"), ("snow covered the road", "the snow"),
)
HELPERS = (
    "an old owl", "a friendly heron", "a traveling baker", "a little firefly", "a wise turtle", "a young miller", "a pair of swans", "a sleepy bear",
    "a lighthouse keeper", "a gray goose", "a kind beaver", "a lost ant",
)
HELPS = (
    "showed the way with a steady light", "built a bridge of fallen branches", "knew a path that no map had", "sang until the way was clear",
    "shared bread and good advice", "carried a rope across", "waited until the worst was over and then led the way",
)
WISHES = (
    "wanted to bring a {item} to a friend", "dreamed of seeing the sea", "looked for a lost {item}", "wanted to learn the oldest song of the land",
    "hoped to find a friend", "wished to see what lay behind the hills", "had promised to deliver a {item} before night",
)
ENDS = (
    "From that day on, {name} was never afraid of {trouble} again.", "That evening they all sat together and laughed.",
    "{Name} slept well that night and dreamed of new journeys.", "And whenever the wind blew, {name} remembered that day and smiled.",
    "They stayed friends for many years.", "The next morning {name} set out again, because there was so much more to see.",
)
MORALS = (
    "Two who share the work go further than one alone.", "Slow steps also reach the top.", "A small light is enough for the next step.",
    "Who asks for help is not weak.", "A promise is kept one step at a time.", "Good friends carry half of every load.",
)
OBJECTIVE = {"he": "him", "she": "her", "it": "it"}
POSSESSIVE = {"he": "his", "she": "her", "it": "its"}


def article(noun: str) -> str:
    """Returns: "a" or "an" for a noun."""
    return "an" if noun[0] in "aeiou" else "a"


def story(rng: random.Random, hero: str | None = None, place: str | None = None, item: str | None = None) -> str:
    """Returns: one story of 7 to 9 sentences; hero, place and item may be asked for."""
    species, pronoun = next((h for h in HEROES if h[0] == hero), None) or rng.choice(HEROES)
    name, trait = rng.choice(NAMES[pronoun]), rng.choice(TRAITS)
    place, item = place or rng.choice(PLACES), item or rng.choice(ITEMS)
    problem, trouble = rng.choice(PROBLEMS)
    wish = rng.choice(WISHES)
    opening = rng.choice((
        f"Once upon a time, there was {article(trait)} {trait} {species} named {name} who lived {place}.",
        f"{place[0].upper()}{place[1:]} there lived {article(trait)} {trait} {species} called {name}.",
        f"Once there was {article(species)} {species} named {name}. {pronoun.capitalize()} was {trait} and lived {place}.",
    ))
    has_item = "{item}" in wish or "{item}" in problem
    wish, problem = wish.format(item=item), problem.format(item=item)
    middle = [f"One day, {name} {wish}."]
    if has_item and item not in wish:
        middle.append(f"{pronoun.capitalize()} took {POSSESSIVE[pronoun]} {item} along.")
    middle.append(rng.choice((f"So {pronoun} set out early in the morning.", f"{pronoun.capitalize()} packed some bread and left at dawn.")))
    middle.append(rng.choice(("But on the way, ", "Soon, however, ", "Then ")) + problem + ".")
    middle.append(rng.choice((f"{name} sat down and thought for a while.", f"{name} was sad, but {pronoun} did not give up.")))
    helper = rng.choice(HELPERS)
    middle.append(f"Just then {helper} came by and {rng.choice(HELPS)}.")
    middle.append(rng.choice((f"Together they went on, and before long {name} was safe.", f"In the end {name} reached the goal, tired and happy.")))
    end = rng.choice(ENDS).format(name=name, Name=name, trouble=trouble)
    closing = [end] if rng.random() < 0.5 else [end, rng.choice(MORALS)]
    return " ".join([opening, *middle, *closing])


def story_request(rng: random.Random) -> tuple[str, str]:
    """Returns: what a user may ask, and a story that fits it."""
    species = rng.choice(HEROES)[0]
    place, item = rng.choice(PLACES), rng.choice(ITEMS)
    return rng.choice((
        (rng.choice(("Tell me a story", "Tell me a story.", "tell me a short story", "Can you tell me a story?", "A story, please", "Write a small story", "Another story please", "I want to hear a story")), story(rng)),
        (f"Tell me a story about {article(species)} {species}", story(rng, species)),
        (f"tell me a story about {article(species)} {species}.", story(rng, species)),
        (f"Write a short story about {article(species)} {species} and {article(item)} {item}", story(rng, species, None, item)),
        (f"Can you tell me a story about {article(species)} {species} {place}?", story(rng, species, place)),
        (f"Tell me a story about {article(species)} {species} and a {rng.choice(('lighthouse', 'storm', 'river'))}", story(rng, species)),
    ))
