"""The accounts of each server, with the public keys of those who have one."""

from collections.abc import Iterable, Mapping

from fednats import permissions
from fednats.permissions import Account, Permissions, User
from fednats.provision.plan import Plan, RegionPlan
from fednats.subjects import HUB


def of_hub(plan: Plan, keys: Mapping[str, str]) -> list[Account]:
    """Accounts of the hub; without leaves the regions' private ones are there as well."""
    run = plan.name
    users = [
        *_user("coordinator", HUB, permissions.coordinator(run), keys),
        *_user("observer", HUB, permissions.observer(run, HUB), keys),
    ]
    if plan.leaves:
        return [permissions.hub_account(run, [*users, *_links(plan, None, keys)])]
    for region in plan.regions:
        users += _user("uplink", region.name, permissions.uplink(run, region.name), keys)
    private = [
        permissions.private_account(run, region.name, _private_users(run, region, keys), leaves=False)
        for region in plan.regions
    ]
    return [permissions.hub_account(run, users, private), *private]


def of_leaf(plan: Plan, region: RegionPlan, keys: Mapping[str, str]) -> list[Account]:
    """Accounts of a region's server."""
    run, above_regions = plan.name, bool(plan.children_of(region.name))
    uplink = _user("uplink", region.name, permissions.uplink(run, region.name, above_regions=above_regions), keys)
    return [
        permissions.uplink_account(run, region.name, [*uplink, *_links(plan, region.name, keys)]),
        permissions.private_account(run, region.name, _private_users(run, region, keys)),
    ]


def _private_users(run: str, region: RegionPlan, keys: Mapping[str, str]) -> list[User]:
    users = [
        *_user("aggregator", region.name, permissions.aggregator(run, region.name), keys),
        *_user("observer", region.name, permissions.observer(run, region.name), keys),
    ]
    for site in region.sites:
        users += _user("site", site, permissions.site(run, region.name, site), keys)
    return users


def _links(plan: Plan, node: str | None, keys: Mapping[str, str]) -> Iterable[User]:
    for child in plan.children_of(node):
        yield from _user("link", child, permissions.link(plan.name, child, node or HUB, plan.below(child)), keys)


def _user(role: str, node: str, allowed: Permissions, keys: Mapping[str, str]) -> list[User]:
    """Return the user, or nobody if its key was revoked."""
    name = permissions.user_name(role, node)
    return [User(name, keys[name], allowed, leaf=role == "link")] if name in keys else []
