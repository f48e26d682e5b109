"""The accounts of each server, with the public keys of those who have one."""

from collections.abc import Iterable, Mapping

from fednats import permissions
from fednats.permissions import Account, Permissions, User
from fednats.provision.plan import Plan, RegionPlan
from fednats.provision.registry import Registry
from fednats.subjects import HUB


def of_hub(plan: Plan, registry: Registry) -> list[Account]:
    """Accounts of the hub; without leaves the regions' private ones are there as well."""
    run, keys = plan.name, registry.keys
    regions = [*plan.children_of(None), *_former(plan, registry, "aggregator")]
    users = [
        *_user("coordinator", HUB, permissions.coordinator(run, regions), keys),
        *_user("observer", HUB, permissions.observer(run, HUB), keys),
    ]
    if plan.leaves:
        return [permissions.hub_account(run, [*users, *_links(plan, None, keys)])]
    for region in plan.regions:
        users += _user("uplink", region.name, permissions.uplink(run, region.name), keys)
    private = [
        permissions.private_account(run, region.name, _private_users(plan, region, registry), leaves=False)
        for region in plan.regions
    ]
    return [permissions.hub_account(run, users, private), *private]


def of_leaf(plan: Plan, region: RegionPlan, registry: Registry) -> list[Account]:
    """Accounts of a region's server."""
    run, keys, children = plan.name, registry.keys, plan.children_of(region.name)
    below = [*children, *_former(plan, registry, "aggregator")] if children else []
    uplink = _user("uplink", region.name, permissions.uplink(run, region.name, below), keys)
    return [
        permissions.uplink_account(run, region.name, [*uplink, *_links(plan, region.name, keys)]),
        permissions.private_account(run, region.name, _private_users(plan, region, registry)),
    ]


def _private_users(plan: Plan, region: RegionPlan, registry: Registry) -> list[User]:
    run, keys = plan.name, registry.keys
    sites = [*region.sites, *_former(plan, registry, "site")]
    users = [
        *_user("aggregator", region.name, permissions.aggregator(run, region.name, sites), keys),
        *_user("observer", region.name, permissions.observer(run, region.name), keys),
    ]
    for site in region.sites:
        users += _user("site", site, permissions.site(run, region.name, site), keys)
    return users


def _links(plan: Plan, node: str | None, keys: Mapping[str, str]) -> Iterable[User]:
    for child in plan.children_of(node):
        yield from _user("link", child, permissions.link(plan.name, child, node or HUB, plan.below(child)), keys)


def _former(plan: Plan, registry: Registry, role: str) -> list[str]:
    """Return the sites, or regions, that were revoked and are nowhere in the plan: what they sent may still be in work."""
    users = (name.partition(".") for name in registry.revoked if name not in plan.users())
    return [node for its_role, _, node in users if its_role == role]


def _user(role: str, node: str, allowed: Permissions, keys: Mapping[str, str]) -> list[User]:
    """Return the user, or nobody if its key was revoked."""
    name = permissions.user_name(role, node)
    return [User(name, keys[name], allowed, leaf=role == "link")] if name in keys else []
