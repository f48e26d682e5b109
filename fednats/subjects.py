"""Every subject, stream, bucket and durable name, built here and nowhere else.

Accounts: a region's *private* account carries updates and evaluations; the *uplink* account (joined to the hub by the
leaf link) carries models downwards and aggregates upwards. A federation has one subject tree, ``fed.<run>.>``.
"""

HUB = "hub"
"""The node at the root; regions are the other nodes."""


# --- models, downwards ------------------------------------------------------------------------------------------------


def model(run: str) -> str:
    """Prefix of the model versions: ``<prefix>.head`` is a manifest, ``<prefix>.chunk.<id>.<i>`` its payload."""
    return f"fed.{run}.model"


def control(run: str) -> str:
    """Whether the run is open; the last message counts."""
    return f"fed.{run}.control"


def models_stream(run: str, node: str) -> str:
    """Stream of models and control at ``node``; the hub's is the original, the others are copies."""
    return f"fed_{run}_models_{node}"


def models_for_stream(run: str, region: str) -> str:
    """Stream at the node above ``region`` that it copies the models from: one for each, which no other can touch."""
    return f"fed_{run}_models_for_{region}"


# --- updates and aggregates, upwards ----------------------------------------------------------------------------------


def update(run: str, region: str, site: str) -> str:
    """Prefix of one site's updates."""
    return f"fed.{run}.update.{region}.{site}"


def evaluation(run: str, region: str, site: str) -> str:
    """One site's evaluations of model versions."""
    return f"fed.{run}.evaluation.{region}.{site}"


def updates_stream(run: str, region: str, site: str) -> str:
    """Stream of one site's updates and evaluations, in its region's private account: what fills it is no other site's."""
    return f"fed_{run}_updates_{region}_{site}"


def aggregate(run: str, region: str) -> str:
    """Prefix of a region's aggregates."""
    return f"fed.{run}.aggregate.{region}"


def evaluation_sum(run: str, region: str) -> str:
    """A region's summed evaluations."""
    return f"fed.{run}.aggregate.{region}.evaluation"


def aggregates_stream(run: str, region: str) -> str:
    """Stream of what a region sends up, in its uplink account."""
    return f"fed_{run}_aggregates_{region}"


def inbox_stream(run: str, node: str, region: str) -> str:
    """Stream at ``node`` that sources the aggregates stream of a ``region`` directly below it."""
    return f"fed_{run}_inbox_{node}_{region}"


def receipt(run: str, region: str, site: str) -> str:
    """What became of one site's updates at its region; the last message counts."""
    return f"fed.{run}.receipt.{region}.{site}"


def receipts_stream(run: str, region: str) -> str:
    """Stream of a region's receipts, in its private account: the newest for each site."""
    return f"fed_{run}_receipts_{region}"


# --- parts of a payload -----------------------------------------------------------------------------------------------


def head(prefix: str) -> str:
    """The message that announces a payload; published after its chunks."""
    return f"{prefix}.head"


def chunks(prefix: str, payload_id: str) -> str:
    """Filter of all chunks of one payload."""
    return f"{prefix}.chunk.{payload_id}.*"


def all_chunks(prefix: str) -> str:
    """Filter of the chunks of all payloads."""
    return f"{prefix}.chunk.>"


def chunk(prefix: str, payload_id: str, index: int) -> str:
    """One chunk of a payload."""
    return f"{prefix}.chunk.{payload_id}.{index}"


# --- notes of a node to itself ----------------------------------------------------------------------------------------


def composition(run: str, node: str, name: str) -> str:
    """What ``node`` made something of: a version by its number, a sum by its id; for nobody but itself."""
    return f"fed.{run}.composition.{node}.{name}"


def compositions_stream(run: str, node: str) -> str:
    """Stream of what ``node`` notes for itself: a region's is in its private account."""
    return f"fed_{run}_compositions_{node}"


# --- one at a time ----------------------------------------------------------------------------------------------------


def lease(prefix: str) -> str:
    """Who may publish below ``prefix`` (`model` or `aggregate`): the newest message is the lease that counts."""
    return f"{prefix}.lease"


def holder(run: str, role: str, name: str) -> str:
    """Where the daemon that holds the lease of ``role`` and ``name`` answers that it is alive."""
    return f"fed.{run}.holder.{role}.{name}"


# --- what was refused -------------------------------------------------------------------------------------------------


def reject(run: str, node: str, sender: str, reason: str) -> str:
    """What ``node`` refused of ``sender``: subjects that list who sent what bad things, without reading any."""
    return f"fed.{run}.reject.{node}.{sender}.{reason}"


def rejects(run: str, node: str) -> str:
    """Filter of all that ``node`` refused."""
    return f"fed.{run}.reject.{node}.>"


def rejects_stream(run: str, node: str) -> str:
    """Stream of what ``node`` refused: a region's is in its private account."""
    return f"fed_{run}_rejects_{node}"


def sender(subject: str) -> str:
    """Return whom the bus lets publish on ``subject``.

    >>> sender("fed.r.update.north.a.head"), sender("fed.r.receipt.north.a"), sender("fed.r.control")
    ('a', 'north', 'hub')
    """
    _, _, kind, *names = subject.split(".")
    if kind in {"update", "evaluation"}:
        return names[1]
    return names[0] if kind in {"aggregate", "composition", "receipt"} else HUB


# --- orders to the coordinator ----------------------------------------------------------------------------------------


def run_order(run: str) -> str:
    """Where the coordinator takes orders to start, extend and list runs: only its own bus user may publish there."""
    return f"fed.{run}.order"


def run_answer(run: str) -> str:
    """What its answers are signed for."""
    return f"fed.{run}.order.answer"


# --- who is there -----------------------------------------------------------------------------------------------------


def event(run: str, role: str, name: str) -> str:
    """What a service says of itself, for people and tools that listen; nothing depends on it."""
    return f"fed.{run}.event.{role}.{name}"


def status(run: str, role: str, name: str) -> str:
    """Where a service answers what it is doing, as JSON: the endpoint of its NATS micro service."""
    return f"fed.{run}.status.{role}.{name}"


def pulse(run: str, node: str) -> str:
    """What a node says every few seconds; heard elsewhere, it tells that the link to it stands."""
    return f"fed.{run}.pulse.{node}"


def presence_bucket(run: str) -> str:
    """KV bucket whose keys expire when a service no longer renews them."""
    return f"fed_{run}_presence"


def presence_key(role: str, name: str) -> str:
    """Key of one service in the presence bucket."""
    return f"{role}.{name}"


def state_bucket(run: str) -> str:
    """KV bucket with the run's state: version, status, metrics."""
    return f"fed_{run}_state"


def durable(node: str, stream: str) -> str:
    """Durable consumer of ``node`` on ``stream``."""
    return f"{node}__{stream}"
