//! Handshakes under way: few, and whoever waits longest makes room.
//!
//! A real handshake is over within milliseconds, so the oldest is the one that has fallen silent.
//! Giving its place to the newcomer lets a client in however many others hold places, also from the
//! same address, where a refusal would shut it out for as long as they like.
//!
//! Does not know what a handshake is; it counts entries and names the one to end.
//!
//! Invariant: no more than `max` entries, of which no address holds more than `per_address_max`.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
};

/// Entries in the order they came.
#[derive(Debug)]
pub(super) struct HalfOpen<T> {
    entries: VecDeque<(Source, T)>,
    max: usize,
    per_address_max: usize,
}

/// Whom a handshake is counted to: an IPv4 address, or the /64 network that one host can have all
/// addresses of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Source([u8; 16]);

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.to_ipv6_mapped().octets()),
            IpAddr::V6(address) => {
                let mut octets = address.octets();
                octets[8..].fill(0);
                Self(octets)
            }
        }
    }
}

impl<T: PartialEq> HalfOpen<T> {
    /// None under way. Both limits are at least 1.
    pub(super) fn new(max: usize, per_address_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            max: max.max(1),
            per_address_max: per_address_max.max(1),
        }
    }

    /// How many are under way.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Makes room for one more from this address: takes out the oldest of the address that is at its
    /// limit, or where all places are taken, of the address that holds most. `None` when there is
    /// room.
    pub(super) fn make_room(&mut self, from: IpAddr) -> Option<T> {
        let from = Source::of(from);
        let mut counts: HashMap<Source, usize> = HashMap::new();
        for (source, _) in &self.entries {
            *counts.entry(*source).or_default() += 1;
        }
        let own = counts.get(&from).copied().unwrap_or(0);
        let loser = if self.per_address_max <= own {
            from
        } else if self.max <= self.entries.len() {
            // The newcomer's own first among equals: it must not push out who holds no more.
            let most = |(source, n): &(&Source, &usize)| (**n, **source == from);
            *counts.iter().max_by_key(most)?.0
        } else {
            return None;
        };
        let oldest = self
            .entries
            .iter()
            .position(|(source, _)| *source == loser)?;
        self.entries.remove(oldest).map(|(_, entry)| entry)
    }

    /// One more; [`Self::make_room`] was called for it.
    pub(super) fn push(&mut self, from: IpAddr, entry: T) {
        assert!(self.entries.len() < self.max, "room was made");
        self.entries.push_back((Source::of(from), entry));
    }

    /// It is over.
    pub(super) fn remove(&mut self, entry: &T) {
        if let Some(at) = self.entries.iter().position(|(_, e)| e == entry) {
            self.entries.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn add(half_open: &mut HalfOpen<u32>, from: &str, entry: u32) -> Option<u32> {
        let out = half_open.make_room(address(from));
        half_open.push(address(from), entry);
        out
    }

    #[test]
    fn the_oldest_of_a_crowded_address_makes_room() {
        let mut half_open = HalfOpen::new(4, 2);
        assert_eq!(add(&mut half_open, "10.0.0.1", 1), None);
        assert_eq!(add(&mut half_open, "10.0.0.1", 2), None);
        assert_eq!(add(&mut half_open, "10.0.0.1", 3), Some(1));
        // The same address in its other form.
        assert_eq!(add(&mut half_open, "::ffff:10.0.0.1", 4), Some(2));
        assert_eq!(add(&mut half_open, "10.0.0.2", 5), None);
        half_open.remove(&3);
        assert_eq!(add(&mut half_open, "10.0.0.1", 6), None);
        assert_eq!(half_open.len(), 3);
        half_open.remove(&77);
        assert_eq!(half_open.len(), 3);
    }

    #[test]
    fn where_all_places_are_taken_the_address_with_most_loses_one() {
        let mut half_open = HalfOpen::new(4, 3);
        for (from, entry) in [
            ("10.0.0.9", 1),
            ("10.0.0.1", 2),
            ("10.0.0.1", 3),
            ("10.0.0.1", 4),
        ] {
            assert_eq!(add(&mut half_open, from, entry), None);
        }
        assert_eq!(add(&mut half_open, "10.0.0.2", 5), Some(2));
        assert_eq!(half_open.len(), 4);
    }

    /// A host has 2^64 addresses of its network, and must not count as that many.
    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let mut half_open = HalfOpen::new(8, 1);
        assert_eq!(add(&mut half_open, "2001:db8:0:1::1", 1), None);
        assert_eq!(add(&mut half_open, "2001:db8:0:1::2", 2), Some(1));
        assert_eq!(add(&mut half_open, "2001:db8:0:2::1", 3), None);
    }

    #[test]
    fn limits_hold_whatever_comes_and_goes() {
        let mut half_open = HalfOpen::new(16, 5);
        let mut seed = 7u32;
        let mut alive: Vec<(u8, u32)> = Vec::new();
        for entry in 0..20_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let host = (seed >> 24) as u8 % 7;
            let out = add(&mut half_open, &format!("10.0.0.{host}"), entry);
            alive.retain(|(_, e)| Some(*e) != out);
            alive.push((host, entry));
            if seed >> 8 & 3 == 0 {
                let (_, done) = alive.remove((seed >> 12) as usize % alive.len());
                half_open.remove(&done);
            }
            assert_eq!(half_open.len(), alive.len());
            assert!(alive.len() <= 16);
            let of_host = |h: u8| alive.iter().filter(|(host, _)| *host == h).count();
            assert!((0..7).all(|h| of_host(h) <= 5));
        }
    }
}
