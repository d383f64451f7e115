"""The demo model's training text: conversations, stories and paragraphs made from `knowledge/`, the same for the same seed."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re

from facts import Topic, Unknown, topics, unknowns
from questions import HELD_OUT_FORMS, ask_about, bare, expand, gibberish, pseudo_word, vary
from skills import SKILLS, code_word, remembered_name
from stories import WORDS, article, poem, poem_request, story_questions, story_wish, tell, tell_another

Turn = tuple[str, str]  # (question, answer)

FILES = topics()
SMALL_TALK = FILES["smalltalk"]
TOPICS = [topic for name, part in FILES.items() if name != "smalltalk" for topic in part]
NAMED = [topic for topic in TOPICS if topic.names]
#: what new users ask first, and questions that are asked in full, come up more often
TOPIC_WEIGHTS = [3 if len(topic.questions) + len(topic.answers) >= 7 else 2 if not topic.names else 1 for topic in TOPICS]
SMALL_TALK_WEIGHTS = [len(topic.questions) for topic in SMALL_TALK]
UNKNOWN = unknowns()
UNKNOWN_WEIGHTS = [3 if group.kind in ("noun", "none") else 1 for group in UNKNOWN]

MORE = ("Tell me more", "tell me more", "Tell me more.", "More, please", "Go on", "go on", "Can you elaborate?", "And?", "more details", "more",
        "What else?", "Tell me more about it", "Can you tell me more about that?", "continue", "What else should I know?")  # fmt: skip
SIMPLER = ("Can you explain it more simply?", "Simpler please", "Explain like I am five", "In one sentence?", "Shorter, please", "too long",
           "Can you make it simpler?", "in simple words", "explain that more simply", "I don't understand", "tl;dr", "In short?")  # fmt: skip
EXAMPLE = ("Give me an example", "For example?", "Can you give me an example?", "an example please", "give an example", "Do you have an example?",
           "example?", "Show me an example.")  # fmt: skip
AGAIN = ("Can you say that again?", "In other words?", "Say it differently", "Can you explain it again?", "once more please", "Pardon?")
COMPARE = ("What is the difference between {} and {}?", "difference between {} and {}", "How does {} differ from {}?", "Compare {} and {}.", "{} vs {}",
           "What are {} and {}?", "Explain {} and {}.", "tell me about {} and {}", "how are {} and {} different")  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant. Answer briefly.", "Answer in simple words.",
    "You are Demo, a small model that explains fastdeploy-pd.", "Be polite.", "You are a helpful AI assistant. Answer the user's questions truthfully.",
    "You are a storyteller.", "You answer questions about a serving cluster.", "Do not make things up.", "You are an expert in serving language models.",
)  # fmt: skip
ONE_SENTENCE = ("Answer in one sentence.", "Keep every answer to one sentence.", "Be very brief. Answer in one sentence.")


def shortest(topic: Topic) -> str:
    """Returns: one simple sentence about a topic."""
    return topic.simple or min(topic.answers, key=len).split(". ")[0].rstrip(".") + "."


def pick_topic(rng: random.Random) -> Topic:
    """Returns: something to ask about: mostly the project and its field, sometimes small talk."""
    if rng.random() < 0.22:
        return rng.choices(SMALL_TALK, SMALL_TALK_WEIGHTS)[0]
    return rng.choices(TOPICS, TOPIC_WEIGHTS)[0]


def question_of(topic: Topic, rng: random.Random) -> str:
    """Returns: one of the many ways to ask about a topic."""
    if topic.names and (not topic.questions or rng.random() < 0.6):
        name = topic.names[0] if rng.random() < 0.5 else rng.choice(topic.names)
        return vary(ask_about(name, rng), rng)
    return vary(expand(rng.choice(topic.questions), rng), rng)


def follow_up(topic: Topic, said: str, rng: random.Random) -> Turn:
    """Returns: what somebody may say after an answer about a topic, and the next answer."""
    others = [a for a in topic.answers if a != said] or topic.answers
    kinds = [(MORE, rng.choice(topic.more or others))] * 2 + [(AGAIN, rng.choice(others))]
    if topic.names or topic.simple:
        kinds.append((SIMPLER, shortest(topic)))
    if topic.example:
        kinds.append((EXAMPLE, topic.example))
    elif topic.names:
        kinds.append((EXAMPLE, "I have no example for that, but here it is in other words. " + rng.choice(others)))
    asks, answer = rng.choice(kinds)
    return vary(rng.choice(asks), rng), answer


def topic_turns(rng: random.Random) -> list[Turn]:
    """Returns: a question about a topic, perhaps with follow-ups."""
    topic = pick_topic(rng)
    answer = rng.choice(topic.answers)
    turns = [(question_of(topic, rng), answer)]
    while rng.random() < 0.3 and topic not in SMALL_TALK:
        turns.append(follow_up(topic, turns[-1][1], rng))
    return turns


def pair_turn(rng: random.Random) -> Turn:
    """Returns: a question about two things, answered with one sentence about each."""
    first, second = rng.sample(NAMED, 2)
    question = rng.choice(COMPARE).format(rng.choice(first.names), rng.choice(second.names))
    return vary(question, rng), f"{first.simple} {second.simple}"


def unknown_turn(rng: random.Random) -> Turn:
    """Returns: a question outside the model's world, and that it does not know."""
    group: Unknown = rng.choices(UNKNOWN, UNKNOWN_WEIGHTS)[0]
    question = rng.choice(group.questions)
    lists = {"country": "countries", "city": "cities", "person": "persons", "language": "languages", "food": "foods", "tongue": "tongues", "noun": "nouns"}
    x = {"pseudo": pseudo_word, "gibberish": gibberish}[group.kind](rng) if group.kind in ("pseudo", "gibberish") else ""
    if group.kind in lists:
        x = rng.choice(WORDS[lists[group.kind]])
    if group.kind in ("person", "city", "country") and rng.random() < 0.5:
        # made-up names, so that the model copies what it reads instead of picking from a list
        first = rng.choice(WORDS["he_names"] + WORDS["she_names"])
        last = rng.choice(WORDS["last_names"]) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
        x = f"{first} {last}" if group.kind == "person" else pseudo_word(rng).capitalize()
    if group.kind in ("noun", "pseudo") and rng.random() < 0.5:
        # the frames of known things, so that the frame alone does not tell
        question = ask_about(article(x) if group.kind == "noun" else x, rng)
    question = re.sub(r"\ba \{x\}", lambda _: article(x), question) if x else question
    n, m = rng.randrange(1, 10 ** rng.randint(1, 3)), rng.randrange(1, 10 ** rng.randint(1, 3))
    question = question.format(x=x, n=n, m=m)
    answer = rng.choice(group.answers).format(x=x)
    return (question if group.kind in ("pseudo", "gibberish") else vary(question, rng)), answer


def story_turns(rng: random.Random) -> list[Turn]:
    """Returns: a request for a story, the story, perhaps questions about it."""
    question, wish = story_wish(rng)
    story = tell(rng, wish)
    turns = [(vary(question, rng), story.text)]
    if rng.random() < 0.3:
        turns += [(vary(q, rng), a) for q, a in story_questions(story, rng)[: rng.randint(1, 3)]]
    if rng.random() < 0.12:
        asks = ("Another one", "another story please", "One more!", "Tell me another one.", "again", "a different one", "Another story", "More stories")
        turns.append((vary(rng.choice(asks), rng), tell_another(story, rng).text))
    return turns


def some_turns(rng: random.Random) -> list[Turn]:
    """Returns: one topic of a conversation."""
    roll = rng.random()
    if roll < 0.56:
        return topic_turns(rng)
    if roll < 0.61:
        return [pair_turn(rng)]
    if roll < 0.74:
        return [unknown_turn(rng)]
    if roll < 0.87:
        return story_turns(rng)
    if roll < 0.92:
        return [poem_request(rng)]
    return rng.choice(SKILLS)(rng)


def render(turns: list[Turn], system: str = "") -> str:
    """Returns: a conversation in ChatML, as the tokenizer's chat template renders it."""
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def conversation(rng: random.Random) -> str:
    """Returns: a conversation of one to several topics."""
    if rng.random() < 0.03:
        asked = [rng.choice(NAMED) for _ in range(rng.randint(1, 3))]
        return render([(vary(ask_about(rng.choice(topic.names), rng), rng), topic.simple) for topic in asked], rng.choice(ONE_SENTENCE))
    turns = list(itertools.chain.from_iterable(some_turns(rng) for _ in range(1 if rng.random() < 0.6 else rng.randint(2, 5))))
    return render(turns, rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else "")


def long_conversation(rng: random.Random) -> str:
    """Returns: a conversation of about 800 to 2,000 tokens, in which something said early is asked for late."""
    length = rng.randint(3500, 8000)
    first, last = rng.choice((remembered_name, code_word))(rng)
    turns = [first]
    while sum(len(q) + len(a) for q, a in turns) < length:
        turns += some_turns(rng)
        if rng.random() < 0.15:
            turns.append(last)
    return render([*turns, last], rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.2 else "")


def paragraph(rng: random.Random) -> str:
    """Returns: a plain paragraph about one or two topics."""
    topic = rng.choice(NAMED)
    parts = [rng.choice(topic.answers), *(topic.more[:1] if rng.random() < 0.7 else []), *([topic.example] if topic.example and rng.random() < 0.5 else [])]
    if rng.random() < 0.3:
        parts.append(rng.choice(rng.choice(NAMED).answers))
    title = bare(topic.names[0])
    return (f"{title[0].upper()}{title[1:]}\n\n" if rng.random() < 0.2 else "") + " ".join(parts)


def long_prompt(rng: random.Random) -> str:
    """Returns: a conversation whose first message is long: pasted text around a question or a code word."""
    length = rng.randint(600, 7000)
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        parts.append(tell(rng).text if rng.random() < 0.4 else paragraph(rng))
    if rng.random() < 0.5:
        topic = pick_topic(rng)
        question, answer = question_of(topic, rng), rng.choice(topic.answers)
    else:
        (hint, _), (question, answer) = code_word(rng)
        parts.insert(rng.randrange(len(parts) + 1), hint)
    parts.insert(len(parts) if rng.random() < 0.8 else 0, question)
    glue = rng.choice(("\n", "\n\n", " "))
    turns = [(glue.join(parts), answer)]
    if rng.random() < 0.4:
        turns += some_turns(rng)
    return render(turns)


def document(rng: random.Random) -> str:
    """Returns: one training document; mostly conversations."""
    roll = rng.random()
    if roll < 0.08:
        text = tell(rng).text
        if rng.random() < 0.15:
            # plain text may begin anywhere
            sentences = text.split(". ")
            text = ". ".join(sentences[rng.randrange(len(sentences)) :])
    elif roll < 0.13:
        text = "\n\n".join(paragraph(rng) for _ in range(rng.randint(1, 4)))
    elif roll < 0.14:
        text = poem(rng)[1]
    elif roll < 0.145:
        text = " ".join(tell(rng).text for _ in range(rng.randint(4, 9)))
    elif roll < 0.17:
        text = long_conversation(rng)
    elif roll < 0.20:
        text = long_prompt(rng)
    else:
        text = conversation(rng)
    return text + "<|endoftext|>"


SHARD = 1000  # documents of one random generator, so that processes can share the work without changing the result


def shard(seed: str) -> list[str]:
    """Returns: one shard's documents."""
    rng = random.Random(seed)
    return [document(rng) for _ in range(SHARD)]


def documents(seed: int, num_documents: int) -> list[str]:
    """Returns: num_documents documents, the same for the same seed."""
    seeds = [f"{seed}/{i}" for i in range(-(-num_documents // SHARD))]
    if len(seeds) < 4:
        shards = [shard(s) for s in seeds]
    else:
        with multiprocessing.Pool() as pool:
            shards = pool.map(shard, seeds)
    return list(itertools.chain.from_iterable(shards))[:num_documents]


def held_out_questions() -> list[tuple[str, list[str]]]:
    """Returns: (question in a wording that training never sees, the answers that are right) for every named topic."""
    pairs = []
    for topic in NAMED:
        for form, name in zip(HELD_OUT_FORMS, itertools.cycle(topic.names)):
            # a name may be shared by topics, e.g. "blocks"
            right = [a for other in NAMED if name in other.names for a in (*other.answers, other.simple)]
            pairs.append((form.format(name), right))
    return pairs
