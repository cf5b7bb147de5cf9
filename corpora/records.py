"""Records, generated: server and system logs, CSV tables, e-mails with replies, configuration
files. They are a kind of text that predictors are not trained on: for measuring.

    print(documents()[0])
"""

from __future__ import annotations

from corpora.grammar import Draw, documents_of, fill, sentence, words

RULES = {
    "user": words("""agnes, bjorn, celia, derek, edith, floyd, gwen, harold, ingrid, jerome,
        lionel, maud, nigel, opal, percy, rhoda, sven, thelma, kai, verna, wayne, yvonne, zelda"""),
    "domain": words("""example.org, example.net, mail.example.com, north.example, south.example,
        office.example, lab.example, shop.example"""),
    "host": ["{role}-{1-24}", "{role}{1-9}.{domain}"],
    "role": words("web, db, cache, proxy, queue, batch, auth, files, build, edge, backup, stream"),
    "service": words("""sshd, cron, nginx, postgres, scheduler, mailer, indexer, billing, gateway,
        uploader, watcher, metrics, resolver, importer, session, payments, search, thumbnails"""),
    "address": [
        "10.{0-255}.{0-255}.{1-254}",
        "192.168.{0-40}.{1-254}",
        "172.{16-31}.{0-255}.{1-254}",
    ],
    "path": [
        "/{part}",
        "/{part}/{1-9999}",
        "/{part}/{part}",
        "/{part}/{part}/{1-999}.{suffix}",
        "/{part}?{option}={1-500}",
        "/api/v{1-3}/{part}/{1-9999}",
    ],
    "part": words("""orders, invoices, users, static, login, reports, images, cart, search, health,
        export, settings, teams, tickets, uploads, archive, feeds, labels, events, stock"""),
    "suffix": words("html, css, js, png, json, txt, pdf, svg"),
    "option": words("""timeout, retries, workers, limit, page, batch_size, max_age, port, depth,
        interval, ttl, threshold, offset, quota, window, backlog, priority"""),
    "hex": ["{10-99}{h}{h}{10-99}{h}{1-9}", "{h}{100-999}{h}{h}{10-99}", "{h}{h}{h}{1000-9999}{h}"],
    "h": list("abcdef"),
    "event": [
        "accepted connection from {address} port {1024-65535}",
        "request {hex} for {path} took {1-4000} ms",
        "user {user} signed in from {address}",
        "user {user} failed to sign in ({1-9} attempts)",
        "{option} changed from {1-99} to {100-900} by {user}",
        "cannot open /var/lib/{service}/{part}.db: No such file or directory",
        "retry {1-5} of 5 for job {hex} in {1-120} s",
        "job {hex} finished: {1-9000} rows, {0-30} errors",
        "connection to {host} lost after {2-900} s, {option}={1-600}",
        "wrote {1-900} MB to /srv/{part}/{hex}.{suffix}",
        "disk /dev/sd{h}{1-4} is {60-99}% full on {host}",
        "certificate of {domain} expires in {1-60} days",
        "worker {1-32} started with pid {300-32000}",
        "{service} reloaded its configuration ({2-80} entries)",
        "queue {part} has {0-20000} messages, oldest {1-999} s",
    ],
    "item": words("""bolt M8, hinge, drill bit, sandpaper, wood glue, wall plug, copper pipe, cable
        tie, paint roller, work glove, tile grout, door handle, spirit level, hose clamp, light
        switch, chisel, pallet jack, dust mask, extension lead, screw set"""),
    "matter": words("""the invoice, our contract, the delivery of {item}, next week's meeting, the
        broken {item}, the audit, {part} on {host}, your application, the office move, the minutes,
        the licence, shipment {hex}, the training, the price list"""),
    "line": [
        "could you send me {matter} before the {1-28}th?",
        "{matter} is still missing; {user} asked for it on {month} {1-28}.",
        "we agreed on {2-400} pieces of {item} at {1-90}.{10-99} each.",
        "please call extension {100-999} about {matter}.",
        "I have forwarded {matter} to {user}@{domain}.",
        "the total is {100-9000}.{10-99}, reference {hex}.",
        "{user} will be away until {month} {1-28}, so {matter} has to wait.",
        "attached are {2-30} pages on {matter}.",
        "room {1-40} is booked from {8-11}:{10-50} to {13-17}:{10-50}.",
        "nothing has changed since {month} apart from {matter}.",
        "let me know whether {matter} can be closed.",
    ],
    "month": words("Jan, Feb, Mar, Apr, May, Jun, Jul, Aug, Sep, Oct, Nov, Dec"),
    "weekday": words("Mon, Tue, Wed, Thu, Fri"),
}


def clock(second: int) -> str:
    """Write seconds of a day as a time."""
    return f"{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}"


def few(draw: Draw, rule: str, n: int) -> list[str]:
    """Draw n texts of a rule, which a document then uses again and again."""
    return [fill(draw, RULES, f"{{{rule}}}") for _ in range(n)]


def server_log(draw: Draw) -> str:
    """Write requests to a web server: few clients and paths, many lines."""
    clients = few(draw, "address", draw.number(2, 6))
    paths = few(draw, "path", draw.number(4, 12))
    agents = ["curl/8.{0-9}.1", "Mozilla/5.0 (X11; Linux x86_64)", "fetcher/{1-9}.{0-20}", "-"]
    agents = [fill(draw, RULES, agent) for agent in agents]
    day = fill(draw, RULES, "{10-28}/{month}/{2015-2025}")
    second = draw.number(0, 80_000)
    lines = []
    for _ in range(draw.number(12, 30)):
        second += draw.number(0, 40)
        status = draw.pick([200, 200, 200, 200, 204, 301, 304, 400, 403, 404, 500])
        request = f'"{draw.pick(["GET", "GET", "POST", "PUT"])} {draw.pick(paths)} HTTP/1.1"'
        end = f'{status} {draw.number(0, 60_000)} "-" "{draw.pick(agents)}"'
        who = draw.pick(clients)
        lines.append(f"{who} - - [{day}:{clock(second)} +0000] {request} {end}")
    return "\n".join(lines) + "\n"


def system_log(draw: Draw) -> str:
    """Write messages of few services on few machines, in one of three forms."""
    hosts = few(draw, "host", draw.number(1, 3))
    services = few(draw, "service", draw.number(2, 5))
    fixed = {name: few(draw, name, 3) for name in ("user", "address", "hex", "part", "option")}
    date = fill(draw, RULES, "{2014-2025}-{10-12}-{10-28}")
    day = fill(draw, RULES, "{month} {10-28}")
    form = draw.number(0, 2)
    second = draw.number(0, 80_000)
    lines = []
    for _ in range(draw.number(14, 36)):
        second += draw.number(0, 90)
        level = draw.pick(["DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR"])
        service = draw.pick(services)
        said = fill(draw, RULES | fixed, "{event}")
        if form == 0:
            pid = draw.number(300, 400)
            lines.append(f"{day} {clock(second)} {draw.pick(hosts)} {service}[{pid}]: {said}")
        elif form == 1:
            lines.append(f"{date}T{clock(second)}Z {level:<7} {service}: {said}")
        else:
            text = f'level={level.lower()} host={draw.pick(hosts)} service={service} msg="{said}"'
            lines.append(f"ts={date}T{clock(second)}.{draw.number(100, 999)}Z {text}")
    return "\n".join(lines) + "\n"


def table(draw: Draw) -> str:
    """Write a CSV table of orders or of readings."""
    sign = draw.pick([",", ",", ";", "\t"])
    users = few(draw, "user", draw.number(3, 7))
    items = few(draw, "item", draw.number(3, 8))
    places = few(draw, "host", draw.number(2, 5))
    orders = draw.chance(0.5)
    head = ["order", "date", "customer", "item", "pieces", "price", "sum"]
    rows = [head if orders else ["time", "station", "temperature", "pressure", "state"]]
    number = draw.number(1000, 90_000)
    for _ in range(draw.number(15, 45)):
        number += draw.number(1, 9)
        if orders:
            pieces = draw.number(1, 60)
            cents = draw.number(50, 9000)
            date = fill(draw, RULES, "20{15-25}-{10-12}-{10-28}")
            prices = [f"{cents / 100:.2f}", f"{pieces * cents / 100:.2f}"]
            row = [str(number), date, draw.pick(users), draw.pick(items), str(pieces), *prices]
        else:
            warm = f"{draw.number(-90, 320) / 10:.1f}"
            air = f"{draw.number(9700, 10_400) / 10:.1f}"
            state = draw.pick(["ok", "ok", "ok", "late", "missing"])
            row = [clock(number), draw.pick(places), warm, air, state]
        rows.append(row)
    return "".join(sign.join(row) + "\n" for row in rows)


def mail(draw: Draw) -> str:
    """Write an e-mail, now and then answered with the text quoted."""
    people = [fill(draw, RULES, f"{user}@{{domain}}") for user in draw.several(RULES["user"], 2)]
    matter = sentence(fill(draw, RULES, "{matter}"))
    quoted: list[str] = []
    out: list[str] = []
    day = draw.number(1, 20)
    for i in range(draw.number(1, 4)):
        sender, to = people[i % 2], people[1 - i % 2]
        when = fill(
            draw, RULES, f"{{weekday}}, {day + i} {{month}} 20{{15-25}} {{10-22}}:{{10-59}}"
        )
        body = [sentence(line) for line in few(draw, "line", draw.number(2, 5))]
        head = [f"From: {sender}", f"To: {to}", f"Subject: {'Re: ' if i else ''}{matter}"]
        name = to.split("@")[0].capitalize()
        closing = draw.pick(["Regards,", "Best wishes,", "Thanks,", "Yours,"])
        letter = [f"Dear {name},", "", *body, "", closing, sender.split("@")[0].capitalize()]
        out += [*head, f"Date: {when}", "", *letter, *quoted, ""]
        quoted = ["", f"On {when}, {sender} wrote:", *(f"> {line}".rstrip() for line in letter)]
    return "\n".join(out)


def settings(draw: Draw) -> str:
    """Write a configuration file: sections with brackets, or blocks that are indented."""
    host = few(draw, "host", 1)[0]
    indented = draw.chance(0.5)
    out = [f"# {fill(draw, RULES, '{service}')} on {host}, changed by {few(draw, 'user', 1)[0]}"]
    for section in draw.several(RULES["service"], draw.number(3, 7)):
        out.append(f"{section}:" if indented else f"\n[{section}]")
        for option in draw.several(RULES["option"], draw.number(3, 8)):
            value = draw.pick(["{1-9000}", "{0-1}.{1-99}", "true", "false", "{host}", "{path}"])
            if option == "port":
                value = "{1024-65535}"
            value = fill(draw, RULES | {"host": host}, value)
            out.append(f"  {option}: {value}" if indented else f"{option} = {value}")
            if draw.chance(0.1):
                out.append(f"{'  ' if indented else ''}# was {draw.number(1, 9000)}")
    return "\n".join(out) + "\n"


KINDS = [server_log, system_log, table, mail, settings]


def write(draw: Draw) -> str:
    """Return one document."""
    return draw.pick(KINDS)(draw)


def documents() -> list[str]:
    """Return the corpus: about a megabyte of records."""
    return documents_of("records", write)
