"""The accounts of each server, their users' public keys, and what the accounts share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fednats import permissions, subjects
from fednats.permissions import Permissions, User
from fednats.provision import sharing
from fednats.provision.plan import Plan, RegionPlan
from fednats.provision.registry import Registry
from fednats.provision.sharing import BusAccount, Grant
from fednats.subjects import HUB

HUB_ACCOUNT = "HUB"
UPLINK_ACCOUNT = "UPLINK"
REGION_ACCOUNT = "REGION"
OBSERVER_ACCOUNT = "OBSERVER"


@dataclass
class Accounts:
    """The accounts of one server."""

    plan: Plan
    registry: Registry
    accounts: list[BusAccount] = field(default_factory=list)
    shares: list[Grant] = field(default_factory=list)

    def render(self, region: str = "") -> str:
        """Return ``accounts.conf``; see `sharing.render`."""
        return sharing.render(self.accounts, self.shares, region=region)

    @property
    def users(self) -> tuple[User, ...]:
        """All users of all accounts."""
        return tuple(user for account in self.accounts for user in account.users)

    def add(self, account: str, role: str, node: str, allowed: Permissions, *, streams: bool = True) -> None:
        """Add an account with one user, or without a user if its key was revoked."""
        name = permissions.user_name(role, node)
        key = self.registry.keys.get(name)
        users = () if key is None else (User(name, key, allowed, leaf=role == "link"),)
        self.accounts.append(BusAccount(account, users, streams))

    def add_observer(self, node: str, owner: str, account: str) -> None:
        """Add the account of the observer of ``node``, whose own account is ``owner``."""
        self.add(account, "observer", node, permissions.observer(self.plan.name, node), streams=False)
        self.shares += sharing.of_observer(self.plan.name, node, owner, account)

    def add_children(self, node: str | None, owner: str, observer: str) -> None:
        """Add two accounts for each region directly below ``node`` (None: the hub): its uplink and its models."""
        plan, run = self.plan, self.plan.name
        for child in plan.children_of(node):
            below, uplink = plan.below(child), sharing.uplink_of(child)
            if plan.leaves:
                allowed = permissions.link(run, child, node or HUB, below)
                self.add(uplink, "link", child, allowed, streams=False)
            else:
                self.add(uplink, "uplink", child, permissions.uplink(run, child))
            self.accounts.append(BusAccount(sharing.down_to(child), ()))
            self.shares += sharing.of_child(run, node or HUB, owner, observer, child, below, leaves=plan.leaves)

    def add_private(self, region: RegionPlan, models: Sequence[Grant], suffix: str = "") -> None:
        """Add a region's private account, its observer's, and one for each site; ``models`` let it copy the models."""
        run, name = self.plan.name, region.name
        private, observer = f"{REGION_ACCOUNT}{suffix}", f"{OBSERVER_ACCOUNT}{suffix}"
        sites = [*region.sites, *self.former("site")]
        self.add(private, "aggregator", name, permissions.aggregator(run, name, sites))
        self.shares += models
        self.add_observer(name, private, observer)
        for site in region.sites:
            account = f"SITE_{site}"
            self.add(account, "site", site, permissions.site(run, name, site), streams=False)
            self.shares += sharing.of_site(run, name, private, observer, site, account)

    def former(self, role: str) -> list[str]:
        """Return the revoked sites or regions that are not in the plan; their messages may still be in progress."""
        users = (name.partition(".") for name in self.registry.revoked if name not in self.plan.users())
        return [node for its_role, _, node in users if its_role == role]


def of_hub(plan: Plan, registry: Registry) -> Accounts:
    """Return the accounts of the hub; without leaves, those of the regions too."""
    made = Accounts(plan, registry)
    regions = [*plan.children_of(None), *made.former("aggregator")]
    made.add(HUB_ACCOUNT, "coordinator", HUB, permissions.coordinator(plan.name, regions))
    made.add_observer(HUB, HUB_ACCOUNT, OBSERVER_ACCOUNT)
    made.add_children(None, HUB_ACCOUNT, OBSERVER_ACCOUNT)
    for region in () if plan.leaves else plan.regions:
        name, suffix = region.name, f"_{region.name}"
        origin, models = sharing.down_to(name), subjects.models_for_stream(plan.name, name)
        made.add_private(region, _models(origin, f"{REGION_ACCOUNT}{suffix}", models, name), suffix)
    return made


def of_leaf(plan: Plan, region: RegionPlan, registry: Registry) -> Accounts:
    """Return the accounts of a region's server."""
    made, name, children = Accounts(plan, registry), region.name, plan.children_of(region.name)
    below = [*children, *made.former("aggregator")] if children else []
    made.add(UPLINK_ACCOUNT, "uplink", name, permissions.uplink(plan.name, name, below))
    made.add_children(name, UPLINK_ACCOUNT, UPLINK_ACCOUNT)
    made.add_private(region, _models(UPLINK_ACCOUNT, REGION_ACCOUNT, subjects.models_stream(plan.name, name), name))
    return made


def _models(owner: str, private: str, stream: str, region: str) -> list[Grant]:
    return sharing.copying(owner, private, stream, permissions.UPLINK_API, permissions.deliver(region))
