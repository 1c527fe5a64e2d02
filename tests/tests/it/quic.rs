//! Strangers at the QUIC port: garbage, other clusters, nobody at all.

use std::net::UdpSocket;

use dsd_tests::{data, node::Node, process, tool};
use tempfile::TempDir;

/// `dsctl --json status` for an address with the certificates of a state folder.
fn status(address: &str, state: &std::path::Path) -> process::Outcome {
    let mut command = tool::command("dsctl");
    command
        .args(["--json", "--timeout", "2s", "--node", address, "--state"])
        .arg(state)
        .arg("status");
    process::run(&mut command, "")
}

/// The failure's exit code and kind; it has advice.
fn check(outcome: &process::Outcome, code: i32, kind: &str) {
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    let lines = outcome.stdout.lines().chain(outcome.stderr.lines());
    let error = lines
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|line| line.get("error").cloned())
        .unwrap_or_else(|| panic!("{outcome:?}"));
    assert_eq!(error["kind"], kind, "{outcome:?}");
    assert!(error["hint"].is_string(), "{outcome:?}");
}

#[test]
fn udp_garbage_does_no_harm() {
    let node = Node::start(&data::reference("llama"));
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut x: u64 = 1;
    let mut byte = || {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (x >> 56) as u8
    };
    for i in 0..3000_usize {
        let mut datagram: Vec<u8> = (0..i % 1500).map(|_| byte()).collect();
        // Every second one begins like a packet of QUIC version 1 that opens a connection.
        let head = [0xc0 | (i as u8 & 3), 0, 0, 0, 1, 8];
        if i % 2 == 0 && head.len() < datagram.len() {
            datagram[..head.len()].copy_from_slice(&head);
        }
        socket.send_to(&datagram, node.quic).unwrap();
    }
    tool::dsctl_json(&node, &["status"]);
    node.must_serve();
}

#[test]
fn certificates_of_another_cluster_are_refused_on_both_sides() {
    let ours = Node::start(&data::reference("llama"));
    let theirs = Node::builder(&data::reference("llama")).spawn();
    let quic = ours.quic.to_string();
    check(&status(&quic, theirs.state()), 3, "untrusted");
    // Trusts our CA, but shows a certificate of theirs.
    let mixed = TempDir::new().unwrap();
    let pki = mixed.path().join("pki");
    std::fs::create_dir(&pki).unwrap();
    for (node, name) in [
        (&ours, "ca.pem"),
        (&theirs, "admin.pem"),
        (&theirs, "admin.key"),
    ] {
        std::fs::copy(node.state().join("pki").join(name), pki.join(name)).unwrap();
    }
    let outcome = status(&quic, mixed.path());
    assert!(matches!(outcome.code, Some(1 | 3)), "{outcome:?}");
    assert!(!outcome.stdout.contains("models"), "{outcome:?}");
    tool::dsctl_json(&ours, &["status"]);
    ours.must_serve();
}

#[test]
fn nobody_at_the_address_is_exit_code_3() {
    let node = Node::builder(&data::reference("llama")).spawn();
    // Bound, so that nobody else is there, and silent.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    check(
        &status(&silent.local_addr().unwrap().to_string(), node.state()),
        3,
        "unreachable",
    );
    for address in ["nonsense", "127.0.0.1:99999"] {
        check(&status(address, node.state()), 1, "usage");
    }
    // A server, but not of this protocol.
    let outcome = status(&node.http.to_string(), node.state());
    assert_eq!(outcome.code, Some(3), "{outcome:?}");
}

#[test]
fn a_state_folder_without_certificates_says_where_they_come_from() {
    let folder = TempDir::new().unwrap();
    let outcome = status("127.0.0.1:1", folder.path());
    check(&outcome, 1, "certificates");
    let said = outcome.stdout + &outcome.stderr;
    assert!(
        said.contains("pki/ca.pem") && said.contains("dsd dev"),
        "{said}"
    );
    std::fs::create_dir(folder.path().join("pki")).unwrap();
    std::fs::write(folder.path().join("pki/ca.pem"), "nonsense").unwrap();
    let outcome = status("127.0.0.1:1", folder.path());
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!((outcome.stdout + &outcome.stderr).contains("ca.pem"));
}
