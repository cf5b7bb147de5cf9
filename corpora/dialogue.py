"""Dialogues, generated: two to four speakers, a topic with facts that are told and asked for again,
plans, opinions, arithmetic, misunderstandings; written down in one of several ways.

    print(documents()[0])
"""

from __future__ import annotations

from corpora.grammar import Draw, documents_of, fill, sentence, words

NAMES = words("""Ada, Ben, Carla, Dmitri, Elena, Farid, Grace, Hugo, Imani, Jonas, Kavya, Leo,
Marta, Nadia, Oscar, Priya, Quentin, Rosa, Samir, Tessa, Umar, Vera, Wanda, Xavier, Yusuf, Zoe,
Anton, Bianca, Cyrus, Dalia, Emil, Freya, Gita, Hamid, Ines, Jakob, Keiko, Lucia, Mateo, Noor, Olga,
Pavel, Rashid, Selma, Tobias, Ursula, Viktor, Yara""")

RULES = {
    "person": NAMES,
    "place": words("""the harbour, the old library, the north gate, the canteen, the market square,
        the bus depot, the workshop, the clinic, the museum, the roof garden, the station, the town
        hall, the boat house, the orchard, the swimming pool, the theatre, the mill"""),
    "street": words("""Alder Lane, Station Road, Mill Street, Canal Walk, Church Hill, Foundry Row,
        Orchard Close, King Street, Weaver's Yard, Lime Avenue, Quarry Road, Harbour View"""),
    "day": words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "month": words("January, March, April, May, June, August, September, October, November"),
    "time": ["{7-11}:{10-59}", "{12-21}:{10-59}", "half past {2-9}", "quarter to {3-10}"],
    "colour": words("blue, green, red, yellow, grey, brown, white, black, orange, purple"),
    "relative": words("""my sister, my neighbour, my cousin, our teacher, the caretaker, my uncle,
        a colleague, my grandmother, the driver, an old friend"""),
    "letter": list("ABCDEFGHKLMNPRSTVWXZ"),
    "code": ["{letter}{letter}-{100-999}", "{10-99}-{10-99}-{10-99}", "{letter}{1000-9999}"],
    "feeling": words("pleased, tired, worried, curious, relieved, annoyed, surprised, hopeful"),
    "often": words("every week, now and then, twice a year, almost daily, since {month}"),
    "sure": words("I think, I am certain, as far as I know, if I remember rightly, they say"),
    "kind": words("""heavy, broken, wooden, foreign, cheap, forgotten, painted, wet, famous,
        narrow, borrowed, noisy, secret, golden, rusty, crooked, gentle, stubborn"""),
    "object": words("""ladder, violin case, dog, suitcase, lantern, parcel, goose, barrel, notebook,
        piano, hat, kettle, statue, rope, mirror, wheelbarrow, clock, tent, basket, fence, trumpet,
        bench, jar of honey, pair of boots, bundle of letters, horse, carpet, box of nails"""),
    "went": words("walked, drove, came back, ran, was sent, moved, hurried, cycled, got lost"),
    "did": words("""carried it home, sold it for {3-90} coins, gave it to {person}, sat down and
        laughed, took a picture, never spoke of it again, called {person}, hid behind the wall,
        asked for the price, left a note for {person}, paid {2-60} more than needed, fell asleep,
        missed the last bus, repaired it with string, counted {11-99} of them, forgot the key"""),
    "when": words("""in {month}, last {day}, before the rain, during the strike, {2-30} years ago,
        at {time}, after the wedding, with {2-7} children, on the {kind} road"""),
    "story": [
        "{Relative} {went} to {place} {when}, saw a {kind} {object}, and {did}.",
        "There was a {kind} {object} at {place}, {when}. {person} {did}.",
        "{When}, {person} and {relative} found a {object} on {street} and {did}.",
        "First {person} {did}, then {relative} {did}, all because of a {kind} {object}.",
        "It reminds me of the {object} that {person} lent me {when}; I {did}.",
        "A {kind} {object} costs {5-300} now, {sure}, and {when} it was {2-90}.",
        "I {went} past {place} {when} and {did}. The {object} was {kind}, the {object} was not.",
    ],
    "well": ["Well,", "Oh,", "Right,", "Listen,", "To be honest,", "Actually,", "You know,"],
    "short": words("""Really?, I see., Good., Never., That makes sense., Certainly., Perhaps., If
        you say so., Not again!, Thank you., Sounds right to me., I had no idea., Let me think.,
        Fine by me., Oh dear."""),
    "feel": [
        "I was {feeling}, I must say.",
        "It made me {feeling}.",
        "{Relative} was {feeling} about it.",
        "Nobody was {feeling} but me.",
        "That is what I was {feeling} about.",
    ],
}

# A topic: what is talked about; what goes wrong with it; what is done about it; facts and their
# values.
TOPICS = {
    "travel": (
        words("""night train, ferry, border crossing, rucksack, guest house, coach, timetable,
            mountain path"""),
        words("was cancelled, left early, was full, cost twice as much, turned back in fog"),
        words("book ahead, take the slow route, pack less, ask at the counter, carry cash"),
        words("""the platform={1-18}, the seat={letter}{1-30}, the fare={20-180} crowns, the
            hotel=Hotel {person}"""),
    ),
    "cooking": (
        words("""bean stew, rye loaf, plum jam, fish soup, rice pot, apple tart, pickled beet,
            lentil curry"""),
        words("burned at the bottom, did not rise, tasted of nothing, boiled over, came out raw"),
        words("stir it more, halve the salt, let it rest, use the iron pan, soak it overnight"),
        words("""the oven={160-240} degrees, the baking time={15-95} minutes, the
            flour={200-900} grams, the cook's name={person}"""),
    ),
    "repair": (
        words("""bicycle, washing machine, roof gutter, door lock, lamp, heating pump, sewing
            machine, radio"""),
        words("rattles, leaks, stopped without warning, smells of smoke, will not turn"),
        words("change the seal, oil the bearing, call the shop, check the fuse, look underneath"),
        words("""the part number={code}, the price={12-400} euros, the warranty={6-60} months,
            the mechanic={person}"""),
    ),
    "health": (
        words("""cough, sprained ankle, new glasses, flu season, back pain, allergy, check-up,
            tooth"""),
        words("""got worse at night, came back, kept me awake, went away by itself, needs a
            second look"""),
        words("drink more water, rest for a while, ask the pharmacist, take a walk, keep it warm"),
        words("""the appointment={day} at {time}, the dose={2-40} drops, the room={100-480}, the
            doctor=Doctor {person}"""),
    ),
    "school": (
        words("""essay, geometry test, choir, science fair, reading list, chess club, school
            play, homework"""),
        words("""was harder than last year, is due too soon, went missing, was marked twice, got
            cancelled"""),
        words("start early, ask for notes, practise aloud, draw a picture of it, share the work"),
        words("""the page={11-390}, the deadline={month} {1-28}, the grade={51-99}
            points, the classroom={code}"""),
    ),
    "garden": (
        words("""tomato bed, pear tree, compost heap, bee hive, hedge, greenhouse, rain barrel,
            bean row"""),
        words("dried out, was eaten by snails, froze last week, grew over the wall, caught mildew"),
        words("water it at dawn, cut it back, cover it, mix in some sand, leave it alone"),
        words("""the number of seedlings={9-120}, the distance={10-90} centimetres, the
            harvest={3-80} kilos, the neighbour={person}"""),
    ),
    "computers": (
        words("backup, printer, password, update, spreadsheet, web shop, camera, old laptop"),
        words("froze again, lost a day of work, asks for a code, runs hot, shows an error"),
        words("restart it, make a copy first, read the log, clear some space, try the other cable"),
        words("""the error number={100-9999}, the password={code}, the size={2-900} gigabytes,
            the version={1-9}.{0-20}"""),
    ),
    "housing": (
        words("""kitchen lease, balcony, stairwell, heating bill, new flat, cellar, moving van,
            letter box"""),
        words("""is too small, was painted without asking, costs more from {month}, is damp, was
            let to others"""),
        words("""write to the owner, measure it again, take photographs, wait for the meeting,
            compare offers"""),
        words("""the rent={420-1900} a month, the address={street} {1-140}, the area={28-130}
            square metres, the floor={1-9}"""),
    ),
    "sport": (
        words("""relay race, rowing team, second half, goalkeeper, marathon, swimming lesson,
            tournament, referee"""),
        words("lost by a hair, was rained off, went to extra time, started late, ended in a draw"),
        words("""train in the morning, change the line-up, warm up longer, watch their left
            side, keep calm"""),
        words("""the score={0-6} to {0-6}, the distance={2-42} kilometres, the shirt
            number={1-30}, the captain={person}"""),
    ),
    "work": (
        words("""quarterly report, night shift, training day, customer visit, invoice, new
            colleague, delivery, budget"""),
        words("""was sent to the wrong office, is a week behind, has a mistake in it, surprised
            everyone, needs a signature"""),
        words("split it in two, phone them, move it to {day}, write it down, ask for help"),
        words("""the order number={code}, the total={300-9800} francs, the extension={200-899},
            the contact={person}"""),
    ),
    "music": (
        words("""cello, rehearsal, folk song, record player, second verse, brass band, concert
            ticket, drum kit"""),
        words("was out of tune, was too fast, sold out, sounded wonderful, broke a string"),
        words("""play it slower, listen to the old recording, count aloud, tune it again, leave
            out the end"""),
        words("""the tempo={52-168} beats, the row={1-32}, the ticket={code}, the
            conductor={person}"""),
    ),
    "history": (
        words("""town archive, stone bridge, family letter, old map, lighthouse, coin, mill
            wheel, portrait"""),
        words("""was rebuilt, burned down, is older than we thought, was found in a barn, had
            two names"""),
        words("""look in the register, compare the dates, ask at the parish, take it to the
            museum, copy it"""),
        words("""the year={1420-1938}, the shelf={code}, the length={4-190} metres, the
            builder={person}"""),
    ),
}

TURNS = [
    "{well} the {thing} {trouble}.|{short} When was that?|On {day}, around {time}. {feel}",
    "Have you seen the {thing}?|Not since {day}. {Sure} it {trouble}.|{short}",
    "What would you do about the {thing}?|I would {advice}. Or {advice}, which takes longer.|"
    "{short} I might {advice} first.",
    "{Relative} says one should {advice}.|{Relative} says many things. It {trouble} anyway.",
    "Do you remember the {thing} at {place}?|Of course, it {trouble}.|{feel}",
    "{second}, are you coming to {place} on {day}?|If it is after {time}, yes.|Then let us say "
    "{time}.|{short}",
    "I bought {2-9} of them at {11-40} each, and {place} wanted {1-10} more for the bag.|{short}",
    "Why did you not {advice}?|Because the {thing} {trouble}, and I was {feeling}.|{short}",
    "I do this {often}. You {advice}, then you {advice}, and in the end it {trouble}.|{feel}",
    "Who told you about the {thing}?|{person}. {Sure} it was at {place}.|{short}",
    "You are wrong about the {thing}, {second}.|Am I? It {trouble} on {day}, I was there.|"
    "Fair enough.",
    "{well} I am {feeling}.|Because of the {thing}?|Because it {trouble}, and {relative} laughed.",
    "Which one is yours, the {colour} one or the {colour} one?|The {colour} one, next to the "
    "{thing}.|{short}",
    "Could you {advice} for me?|{short} But not before {day}.|{day} is fine.",
    "{story}|{short} {story}|{feel}",
    "{well} {story}|And the {thing}?|It {trouble}. {story}",
    "{story} {story}|{short}",
    "Tell me about the {object}.|{story} {story}|{short} {story}",
    "Did {person} see the {kind} {object}?|Yes. {story}|{story}",
    "How was {day}?|{story} Apart from that, the {thing} {trouble}.|{feel}",
    "Why is there a {object} next to the {thing}?|{story}|{short} I would {advice}.",
    "Let us meet at {place}, {street} {1-90}.|{short} What should I bring?|Only the {thing}.",
]
TELL = [
    "What is {fact}?|{value}.",
    "By the way, {fact} is {value}.|{value}? I will write that down.",
    "Do you know {fact}?|{Sure}, it is {value}.|{short}",
    "They changed it: {fact} is now {value}.|{short} It used to be {other}.",
    "{second}, please note {fact}: {value}.|Noted, {value}.",
    "Is {fact} {other}?|No, {value}. You always mix that up.",
]
RECALL = [
    "Sorry, what was {fact} again?|{value}.",
    "And {fact} was {other}, you said?|No. {value}.|Ah yes, {value}.",
    "Tell {person} too: {fact} is {value}.|I will. {value}, was it?|Yes.",
    "I forgot {fact}.|{value}, {first}. It has not changed.",
    "So, to sum up: {fact} is {value}.|Exactly.",
]
OPENING = [
    "Good morning, {second}.|Good morning. You look {feeling}.",
    "Hello {second}, do you have a minute?|For you, {first}, always.",
    "{second}! I have not seen you since {month}.|{first}! How are you?|{feel}",
    "Can we talk about the {thing}?|{short}",
    "Is this {street} {1-90}?|It is. Are you {first}?|Yes, we spoke on {day}.",
]
CLOSING = [
    "I have to go. See you on {day}.|See you, {first}.",
    "Thank you, {second}.|You are welcome.",
    "Until {time}, then.|Until then.",
    "Let me know how it goes.|I will write on {day}.",
]


def rules_of(draw: Draw, topic: str) -> dict:
    """Return what templates of a dialogue on a topic are filled with."""
    things, troubles, advice, _ = TOPICS[topic]
    few = {"thing": draw.several(things, 4), "trouble": troubles, "advice": advice}
    starts = ("relative", "sure", "when")
    return RULES | few | {sentence(word): list(map(sentence, RULES[word])) for word in starts}


def exchanges_of(draw: Draw, topic: str, rules: dict) -> list[tuple[str, dict]]:
    """Return the templates of a dialogue in order, each with rules of its own: every fact that is
    told is asked for again later."""
    facts = [fact.split("=") for fact in TOPICS[topic][3]]
    told = []
    asked = []
    for what, value in draw.several(facts, draw.number(2, len(facts))):
        fact = {"fact": what, "value": fill(draw, rules, value), "other": fill(draw, rules, value)}
        told.append((draw.pick(TELL), fact))
        asked.append((draw.pick(RECALL), fact))
    talk = [(turn, {}) for turn in draw.several(TURNS, draw.number(4, 11))]
    middle = len(talk) // 2
    early = draw.several(told + talk[:middle], len(told) + middle)
    late = draw.several(asked + talk[middle:], len(asked) + len(talk) - middle)
    return [(draw.pick(OPENING), {}), *early, *late, (draw.pick(CLOSING), {})]


def write(draw: Draw) -> str:
    """Return one dialogue."""
    topic = draw.pick(sorted(TOPICS))
    speakers = draw.several(NAMES, draw.pick([2, 2, 2, 3, 4]))
    rules = rules_of(draw, topic)
    lines = []
    for exchange, own in exchanges_of(draw, topic, rules):
        pair = draw.several(speakers, 2)
        said = fill(draw, rules | own | {"first": pair[0], "second": pair[1]}, exchange)
        for i, words_said in enumerate(said.split("|")):
            lines.append((pair[i % 2], sentence(words_said)))
    return draw.pick(STYLES)(draw, topic, lines)


def as_script(draw: Draw, topic: str, lines: list[tuple[str, str]]) -> str:
    """Write `Name: words`."""
    return "".join(f"{who}: {said}\n" for who, said in lines)


def as_play(draw: Draw, topic: str, lines: list[tuple[str, str]]) -> str:
    """Write a scene: names in capitals above the words."""
    scene = (
        f"SCENE {draw.number(1, 9)}. {sentence(fill(draw, RULES, '{place}, a {day} in {month}'))}."
    )
    return scene + "\n\n" + "\n\n".join(f"{who.upper()}\n{said}" for who, said in lines) + "\n"


def as_chat(draw: Draw, topic: str, lines: list[tuple[str, str]]) -> str:
    """Write messages with the minute of each."""
    minute = draw.number(7 * 60, 20 * 60)
    out = [f"#{topic}"]
    for who, said in lines:
        out.append(f"[{minute // 60:02d}:{minute % 60:02d}] <{who.lower()}> {said}")
        minute += draw.number(0, 3)
    return "\n".join(out) + "\n"


def as_story(draw: Draw, topic: str, lines: list[tuple[str, str]]) -> str:
    """Write words in quotation marks, and now and then who says them."""
    out = []
    for who, said in lines:
        verb = draw.pick(["said", "asked", "replied", "answered", "murmured", "went on"])
        inside = f"{said[:-1]}," if said.endswith(".") else said
        out.append(f'"{inside}" {verb} {who}.' if draw.chance(0.6) else f'"{said}"')
    return "\n".join(out) + "\n"


def as_interview(draw: Draw, topic: str, lines: list[tuple[str, str]]) -> str:
    """Write a transcript with numbered turns under a heading."""
    heading = f"Transcript {draw.number(100, 999)}: {topic}"
    turns = [f"{i}. {who} -- {said}" for i, (who, said) in enumerate(lines, 1)]
    return "\n".join([heading, *turns]) + "\n"


STYLES = [as_script, as_play, as_chat, as_story, as_interview]


def documents() -> list[str]:
    """Return the corpus: about a megabyte of dialogues."""
    return documents_of("dialogue", write)
