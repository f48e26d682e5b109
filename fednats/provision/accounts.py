"""The accounts of each server, with the public keys of those who have one, and what the accounts share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fednats import permissions, subjects
from fednats.permissions import Permissions, User
from fednats.provision import sharing
from fednats.provision.plan import Plan, RegionPlan
from fednats.provision.sharing import Account, Share
from fednats.subjects import HUB

HUB_ACCOUNT = "HUB"
UPLINK_ACCOUNT = "UPLINK"
REGION_ACCOUNT = "REGION"
OBSERVER_ACCOUNT = "OBSERVER"


@dataclass
class Accounts:
    """Those of one server."""

    accounts: list[Account] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)

    def render(self, region: str = "") -> str:
        """Return ``accounts.conf``; see `sharing.render`."""
        return sharing.render(self.accounts, self.shares, region=region)

    @property
    def users(self) -> tuple[User, ...]:
        """Everybody in them."""
        return tuple(user for account in self.accounts for user in account.users)


def of_hub(plan: Plan, keys: Mapping[str, str]) -> Accounts:
    """Accounts of the hub; without leaves the regions' are there as well."""
    run, made = plan.name, Accounts()
    coordinator = _user("coordinator", HUB, permissions.coordinator(run), keys)
    made.accounts.append(Account(HUB_ACCOUNT, coordinator))
    _add_observer(made, run, HUB, HUB_ACCOUNT, OBSERVER_ACCOUNT, keys)
    _add_children(made, plan, None, HUB_ACCOUNT, OBSERVER_ACCOUNT, keys)
    if not plan.leaves:
        for region in plan.regions:
            models = sharing.copying(
                sharing.down_to(region.name),
                f"{REGION_ACCOUNT}_{region.name}",
                subjects.models_for_stream(run, region.name),
                permissions.UPLINK_API,
                permissions.deliver(region.name),
            )
            _add_private(made, run, region, f"_{region.name}", models, keys)
    return made


def of_leaf(plan: Plan, region: RegionPlan, keys: Mapping[str, str]) -> Accounts:
    """Accounts of a region's server."""
    run, name, made = plan.name, region.name, Accounts()
    above_regions = bool(plan.children_of(name))
    uplink = _user("uplink", name, permissions.uplink(run, name, above_regions=above_regions), keys)
    made.accounts.append(Account(UPLINK_ACCOUNT, uplink))
    _add_children(made, plan, name, UPLINK_ACCOUNT, UPLINK_ACCOUNT, keys)
    models = subjects.models_stream(run, name)
    _add_private(
        made,
        run,
        region,
        "",
        sharing.copying(UPLINK_ACCOUNT, REGION_ACCOUNT, models, permissions.UPLINK_API, permissions.deliver(name)),
        keys,
    )
    return made


def _add_children(
    made: Accounts, plan: Plan, node: str | None, owner: str, observer: str, keys: Mapping[str, str]
) -> None:
    run = plan.name
    for child in plan.children_of(node):
        below = plan.below(child)
        if plan.leaves:
            users = _user("link", child, permissions.link(run, child, node or HUB, below), keys)
        else:
            users = _user("uplink", child, permissions.uplink(run, child), keys)
        made.accounts += [
            Account(sharing.uplink_of(child), users, streams=not plan.leaves),
            Account(sharing.down_to(child), ()),
        ]
        made.shares += sharing.of_child(run, node or HUB, owner, observer, child, below, leaves=plan.leaves)


def _add_private(
    made: Accounts, run: str, region: RegionPlan, suffix: str, models: Sequence[Share], keys: Mapping[str, str]
) -> None:
    """Add a region's private account, its observer's, and one for each site."""
    private, observer = f"{REGION_ACCOUNT}{suffix}", f"{OBSERVER_ACCOUNT}{suffix}"
    aggregator = _user("aggregator", region.name, permissions.aggregator(run, region.name), keys)
    made.accounts.append(Account(private, aggregator))
    made.shares += models
    _add_observer(made, run, region.name, private, observer, keys)
    for site in region.sites:
        account = f"SITE_{site}"
        users = _user("site", site, permissions.site(run, region.name, site), keys)
        made.accounts.append(Account(account, users, streams=False))
        made.shares += sharing.of_site(run, region.name, private, observer, site, account)


def _add_observer(made: Accounts, run: str, node: str, owner: str, account: str, keys: Mapping[str, str]) -> None:
    users = _user("observer", node, permissions.observer(run, node), keys)
    made.accounts.append(Account(account, users, streams=False))
    made.shares += sharing.of_observer(run, node, owner, account)


def _user(role: str, node: str, allowed: Permissions, keys: Mapping[str, str]) -> tuple[User, ...]:
    """Return the user, or nobody if its key was revoked."""
    name = permissions.user_name(role, node)
    return (User(name, keys[name], allowed, leaf=role == "link"),) if name in keys else ()
