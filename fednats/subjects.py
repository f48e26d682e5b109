"""Builds every subject, stream, bucket and durable name; nothing else does.

A region's *private* account carries updates and evaluations. The *uplink* account, joined to the hub by the leaf link,
carries models downwards and aggregates upwards. A federation has one subject tree, ``fed.<run>.>``.
"""

HUB = "hub"
"""The node at the root; all other nodes are regions."""


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
    """Stream above ``region`` that it copies the models from. Each region has its own, which no other can touch."""
    return f"fed_{run}_models_for_{region}"


# --- updates and aggregates, upwards ----------------------------------------------------------------------------------


def update(run: str, region: str, site: str) -> str:
    """Prefix of one site's updates."""
    return f"fed.{run}.update.{region}.{site}"


def evaluation(run: str, region: str, site: str) -> str:
    """One site's evaluations of model versions."""
    return f"fed.{run}.evaluation.{region}.{site}"


def updates_stream(run: str, region: str, site: str) -> str:
    """Stream of one site's updates and evaluations, in its region's private account: no site fills another's."""
    return f"fed_{run}_updates_{region}_{site}"


def aggregate(run: str, region: str) -> str:
    """Prefix of a region's aggregates."""
    return f"fed.{run}.aggregate.{region}"


def evaluation_sum(run: str, region: str) -> str:
    """A region's summed evaluations."""
    return f"fed.{run}.aggregate.{region}.evaluation"


def aggregates_stream(run: str, region: str) -> str:
    """Stream of everything a region sends up, in its uplink account."""
    return f"fed_{run}_aggregates_{region}"


def inbox_stream(run: str, node: str, region: str) -> str:
    """Stream at ``node`` that sources the aggregates stream of ``region``, directly below it."""
    return f"fed_{run}_inbox_{node}_{region}"


def receipt(run: str, region: str, site: str) -> str:
    """A region's verdicts on one site's updates; the last message counts."""
    return f"fed.{run}.receipt.{region}.{site}"


def receipts_stream(run: str, region: str) -> str:
    """Stream of a region's receipts, in its private account; keeps the newest for each site."""
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
    """Note by ``node`` of the parts of a version (named by number) or a sum (by id); only the node reads it."""
    return f"fed.{run}.composition.{node}.{name}"


def compositions_stream(run: str, node: str) -> str:
    """Stream of the notes of ``node`` to itself; a region's is in its private account."""
    return f"fed_{run}_compositions_{node}"


# --- leases -----------------------------------------------------------------------------------------------------------


def lease(prefix: str) -> str:
    """Leases to publish below ``prefix`` (`model` or `aggregate`); the newest message counts."""
    return f"{prefix}.lease"


def holder(run: str, role: str, name: str) -> str:
    """Where the daemon that holds the lease of ``role`` and ``name`` answers that it is alive."""
    return f"fed.{run}.holder.{role}.{name}"


# --- refused messages -------------------------------------------------------------------------------------------------


def reject(run: str, node: str, sender: str, reason: str) -> str:
    """Messages of ``sender`` refused by ``node``. The subjects alone show who sent bad messages, and of which kind."""
    return f"fed.{run}.reject.{node}.{sender}.{reason}"


def rejects(run: str, node: str) -> str:
    """Filter of everything that ``node`` refused."""
    return f"fed.{run}.reject.{node}.>"


def rejects_stream(run: str, node: str) -> str:
    """Stream of everything that ``node`` refused; a region's is in its private account."""
    return f"fed_{run}_rejects_{node}"


def sender(subject: str) -> str:
    """Return the node that the bus allows to publish on ``subject``.

    >>> sender("fed.r.update.north.a.head"), sender("fed.r.receipt.north.a"), sender("fed.r.control")
    ('a', 'north', 'hub')
    """
    _, _, kind, *names = subject.split(".")
    if kind in {"update", "evaluation"}:
        return names[1]
    return names[0] if kind in {"aggregate", "composition", "receipt"} else HUB


# --- orders to the coordinator ----------------------------------------------------------------------------------------


def run_order(run: str) -> str:
    """Orders to start, extend and list runs, taken by the coordinator. Only its own bus user may publish here."""
    return f"fed.{run}.order"


def run_answer(run: str) -> str:
    """Subject that the coordinator's answers to orders are signed for."""
    return f"fed.{run}.order.answer"


# --- presence and state -----------------------------------------------------------------------------------------------


def event(run: str, role: str, name: str) -> str:
    """A service's reports, for people and tools that listen; nothing depends on them."""
    return f"fed.{run}.event.{role}.{name}"


def status(run: str, role: str, name: str) -> str:
    """Where a service reports its state as JSON: the endpoint of its NATS micro service."""
    return f"fed.{run}.status.{role}.{name}"


def pulse(run: str, node: str) -> str:
    """A node's sign of life every few seconds; hearing it elsewhere shows that the link to the node is up."""
    return f"fed.{run}.pulse.{node}"


def presence_bucket(run: str) -> str:
    """KV bucket whose keys expire when a service stops renewing them."""
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
