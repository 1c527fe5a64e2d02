//! What `dsctl` gets from a node: the real client and server over loopback, a real engine behind.

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::unix::fs::PermissionsExt,
    sync::Arc,
    time::Duration,
};

use dsd_proto::{
    code::Code,
    quic::{Client, ClientError, Event, Role, Server, ServerLimits, pki},
    wire::{
        admin::{
            CapChange, ErrorReply, ModelListRequest, ModelLoadRequest, ModelState,
            ModelUnloadRequest, ModelVerifyRequest, ModelsChange, Progress, StatusRequest,
            TenantAddRequest, TenantClass, TenantListRequest, TenantPatch, TenantRemoveRequest,
            TenantRotateKeyRequest, TenantSetRequest, TenantShowRequest,
        },
        generate::{
            ChatMessage, Finish, GenerateDelta, GenerateDone, GenerateRequest, Input,
            Role as Speaker, Sampling,
        },
    },
};
use tempfile::TempDir;
use tokio::{task::JoinSet, time};

use super::{Admin, AdminConfig};
use crate::{
    catalog::{self, Catalog, LoadError, ServedModel},
    gateway::tests::kit::{CONTEXT_LEN, Pace, QUICK, model},
    runtime::clock,
    tenants::{Now, Source, Tenants},
    weights::tests::writer,
};

const DEADLINE: Duration = Duration::from_secs(20);
const SLOW: Pace = Pace {
    step: Duration::from_millis(20),
    ..QUICK
};

/// A node without HTTP, and an operator connected to it.
struct Node {
    client: Client,
    catalog: Arc<Catalog>,
    folder: TempDir,
    _tasks: JoinSet<()>,
}

impl Node {
    async fn start(models: Vec<ServedModel>) -> Self {
        Self::start_with(Tenants::open(clock::now()), models).await
    }

    async fn start_with(tenants: Tenants, models: Vec<ServedModel>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (pki, store) = (folder.path().join("pki"), folder.path().join("models"));
        std::fs::create_dir(&store).unwrap();
        let now = clock::unix_seconds();
        pki::ensure(
            &pki,
            &"dev".parse().unwrap(),
            &"node-1".parse().unwrap(),
            now,
        )
        .unwrap();
        let catalog = Arc::new(Catalog::new(Box::new(|name, path, on_progress| {
            for n_done in 0..3 {
                on_progress(catalog::Progress {
                    stage: "mapping",
                    n_done,
                    n_total: 3,
                });
            }
            if name.contains("bug") {
                panic!("a bug of the loader");
            }
            if name.contains("bad") {
                return Err(LoadError::Checkpoint {
                    path: path.to_owned(),
                    source: "it is truncated".into(),
                });
            }
            Ok(ServedModel {
                path: path.to_owned(),
                ..model(name, &SLOW)
            })
        })));
        for model in models {
            catalog.insert(model);
        }
        let config = AdminConfig {
            node: "node-1".to_owned(),
            cluster: "dev".to_owned(),
            http_address: "127.0.0.1:8000".to_owned(),
            quic_address: "127.0.0.1:7600".to_owned(),
            models_dir: store,
            token_age_max: Duration::from_secs(60),
            request_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_millis(50),
            encoders_max: 2,
        };
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let identity = pki::load(&pki, Role::Node, now).unwrap();
        let admin = Admin::new(config, Arc::clone(&catalog), Arc::new(tenants));
        let server = Server::new(socket, &identity, admin, ServerLimits::default()).unwrap();
        let address = server.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(server.run(std::future::pending()));
        let operator = pki::load(&pki, Role::Admin, now).unwrap();
        let client = Client::connect(address, &operator, DEADLINE).await.unwrap();
        Self {
            client,
            catalog,
            folder,
            _tasks: tasks,
        }
    }

    async fn generate(
        &self,
        request: &GenerateRequest,
    ) -> Result<(Vec<GenerateDelta>, GenerateDone), ErrorReply> {
        let mut stream = self.client.stream(request, DEADLINE).await.unwrap();
        let mut deltas = Vec::new();
        loop {
            match stream.next(DEADLINE).await {
                Ok(Some(Event::Item(delta))) => deltas.push(delta),
                Ok(Some(Event::Reply(done))) => return Ok((deltas, done)),
                Ok(None) => panic!("the stream has no reply"),
                Err(ClientError::Answered(error)) => return Err(error),
                Err(e) => panic!("{e}"),
            }
        }
    }

    async fn load(&self, path_or_name: &str) -> (Vec<Progress>, Result<String, ErrorReply>) {
        let request = ModelLoadRequest {
            path_or_name: path_or_name.to_owned(),
        };
        let mut stream = self.client.stream(&request, DEADLINE).await.unwrap();
        let mut reports = Vec::new();
        loop {
            match stream.next(DEADLINE).await {
                Ok(Some(Event::Item(report))) => reports.push(report),
                Ok(Some(Event::Reply(reply))) => return (reports, Ok(reply.name)),
                Err(ClientError::Answered(error)) => return (reports, Err(error)),
                other => panic!("{other:?}"),
            }
        }
    }

    fn n_sequences(&self) -> usize {
        let load = self.catalog.lookup(None).unwrap().replica.load();
        load.n_running + load.n_waiting
    }

    async fn wait_for_sequences(&self, n: usize) {
        let wait = async {
            while self.n_sequences() != n {
                time::sleep(Duration::from_millis(2)).await;
            }
        };
        time::timeout(DEADLINE, wait)
            .await
            .expect("the number of sequences does not come");
    }
}

fn request(input: Input, max_tokens: Option<u32>) -> GenerateRequest {
    GenerateRequest {
        model: String::new(),
        input,
        max_tokens,
        sampling: Sampling {
            temperature: Some(0.0),
            ..Sampling::DEFAULT
        },
        stop: Vec::new(),
        thinking: None,
    }
}

#[tokio::test]
async fn status_shows_node_and_models() {
    let node = Node::start(vec![model("tiny", &QUICK)]).await;
    let status = node.client.call(&StatusRequest {}, DEADLINE).await.unwrap();
    assert_eq!(
        (status.node.as_str(), status.cluster.as_str(), status.ready),
        ("node-1", "dev", true)
    );
    assert_eq!(status.models.len(), 1);
    let tiny = &status.models[0];
    assert_eq!(
        (tiny.name.as_str(), tiny.state.clone()),
        ("tiny", ModelState::Ready)
    );
    assert_eq!(tiny.context_len as usize, CONTEXT_LEN);
    assert!(tiny.last_token_age_ms.is_some() && 0 < tiny.n_blocks);
    let empty = Node::start(vec![]).await;
    let status = empty
        .client
        .call(&StatusRequest {}, DEADLINE)
        .await
        .unwrap();
    assert_eq!(
        (status.ready, status.ready_reason.as_str()),
        (false, "no model is loaded")
    );
}

#[tokio::test]
async fn text_and_chats_are_answered_in_deltas() {
    let node = Node::start(vec![model("tiny", &QUICK)]).await;
    let (deltas, done) = node
        .generate(&request(Input::Prompt("hi".into()), Some(9)))
        .await
        .unwrap();
    let text: String = deltas.iter().map(|delta| delta.content.as_str()).collect();
    assert_eq!((text.len(), done.finish_reason), (9, Finish::Length));
    assert_eq!((done.n_prompt_tokens, done.n_completion_tokens), (2, 9));
    assert_eq!(deltas.iter().map(|delta| delta.n_tokens).sum::<u32>(), 9);
    let ids = request(
        Input::Tokens(vec![u32::from(b'h'), u32::from(b'i')]),
        Some(9),
    );
    let (same, _) = node.generate(&ids).await.unwrap();
    assert_eq!(
        same.iter()
            .map(|delta| delta.content.as_str())
            .collect::<String>(),
        text
    );

    let stop = GenerateRequest {
        stop: vec![text[3..5].to_owned()],
        ..request(Input::Prompt("hi".into()), Some(9))
    };
    let (deltas, done) = node.generate(&stop).await.unwrap();
    let cut: String = deltas.iter().map(|delta| delta.content.as_str()).collect();
    assert_eq!(
        (cut.as_str(), done.finish_reason),
        (&text[..text.find(&text[3..5]).unwrap()], Finish::Stop)
    );

    let chat = Input::Chat(vec![ChatMessage {
        role: Speaker::User,
        content: "hi".into(),
    }]);
    let thinking = GenerateRequest {
        thinking: Some(true),
        ..request(chat, Some(5))
    };
    let (deltas, _) = node.generate(&thinking).await.unwrap();
    assert_eq!(
        deltas
            .iter()
            .map(|delta| delta.reasoning.len())
            .sum::<usize>(),
        5
    );
    assert!(deltas.iter().all(|delta| delta.content.is_empty()));
}

#[tokio::test]
async fn what_cannot_be_generated_is_refused_by_code() {
    let node = Node::start(vec![model("tiny", &QUICK)]).await;
    let hi = || Input::Prompt("hi".into());
    let sampling = |sampling: Sampling| GenerateRequest {
        sampling,
        ..request(hi(), Some(1))
    };
    let nan = Sampling {
        temperature: Some(f32::NAN),
        ..Sampling::DEFAULT
    };
    let huge = Sampling {
        top_p: Some(2.0),
        ..Sampling::DEFAULT
    };
    let tool = Input::Chat(vec![ChatMessage {
        role: Speaker::Tool,
        content: "hi".into(),
    }]);
    for (request, code) in [
        (
            GenerateRequest {
                model: "other".into(),
                ..request(hi(), Some(1))
            },
            Code::ModelNotFound,
        ),
        (request(hi(), Some(0)), Code::InvalidRequest),
        (
            request(Input::Tokens(vec![]), Some(1)),
            Code::InvalidRequest,
        ),
        (
            request(Input::Tokens(vec![u32::MAX]), Some(1)),
            Code::InvalidRequest,
        ),
        (request(Input::Chat(vec![]), Some(1)), Code::InvalidRequest),
        (request(tool, Some(1)), Code::Unsupported),
        (
            request(Input::Prompt("x".repeat(1000)), Some(1)),
            Code::ContextLengthExceeded,
        ),
        (sampling(nan), Code::InvalidRequest),
        (sampling(huge), Code::InvalidRequest),
        (
            GenerateRequest {
                stop: vec![String::new()],
                ..request(hi(), Some(1))
            },
            Code::InvalidRequest,
        ),
    ] {
        let error = node
            .generate(&request)
            .await
            .expect_err("the request is wrong");
        assert_eq!(error.code(), code, "{}", error.message);
    }
    node.generate(&request(hi(), Some(1))).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_goes_away_frees_its_sequence() {
    let node = Node::start(vec![model("tiny", &SLOW)]).await;
    let request = request(Input::Prompt("hi".into()), Some(200));
    let mut stream = node.client.stream(&request, DEADLINE).await.unwrap();
    stream.next(DEADLINE).await.unwrap();
    node.wait_for_sequences(1).await;
    drop(stream);
    node.wait_for_sequences(0).await;
}

#[tokio::test]
async fn models_are_loaded_listed_and_unloaded() {
    let node = Node::start(vec![]).await;
    let store = node.folder.path().join("models");
    std::fs::write(store.join("tiny.gguf"), b"weights").unwrap();
    std::fs::write(store.join("bad.gguf"), b"weights").unwrap();
    let list = node
        .client
        .call(&ModelListRequest {}, DEADLINE)
        .await
        .unwrap();
    let seen: Vec<_> = list
        .models
        .iter()
        .map(|m| (m.name.as_str(), m.state.clone(), m.bytes))
        .collect();
    assert_eq!(seen, [("bad", None, 7), ("tiny", None, 7)]);

    let (reports, loaded) = node.load("tiny").await;
    assert_eq!(loaded.unwrap(), "tiny");
    assert_eq!(
        reports.iter().map(|r| r.done).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    node.generate(&request(Input::Prompt("hi".into()), Some(2)))
        .await
        .unwrap();
    assert_eq!(
        node.load("tiny").await.1.unwrap_err().code(),
        Code::ModelExists
    );
    assert_eq!(
        node.load("absent").await.1.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        node.load("../models/tiny.gguf").await.1.unwrap_err().code(),
        Code::NotFound
    );
    let error = node.load("bad").await.1.unwrap_err();
    assert_eq!(error.code(), Code::WeightsInvalid);
    assert!(
        error.message.contains("it is truncated"),
        "{}",
        error.message
    );
    let list = node
        .client
        .call(&ModelListRequest {}, DEADLINE)
        .await
        .unwrap();
    let seen: Vec<_> = list
        .models
        .iter()
        .map(|m| (m.name.as_str(), m.state.clone()))
        .collect();
    assert_eq!(
        seen,
        [
            ("bad", Some(ModelState::Failed)),
            ("tiny", Some(ModelState::Ready))
        ]
    );
    // A failed load does not take the node's readiness away, and may be tried again.
    assert!(
        node.client
            .call(&StatusRequest {}, DEADLINE)
            .await
            .unwrap()
            .ready
    );
    assert_eq!(
        node.load("bad").await.1.unwrap_err().code(),
        Code::WeightsInvalid
    );

    // Runs for longer than the drain time, so the unload ends it.
    let long = request(Input::Prompt("hi".into()), Some(200));
    let mut stream = node.client.stream(&long, DEADLINE).await.unwrap();
    stream.next(DEADLINE).await.unwrap();
    let unload = ModelUnloadRequest {
        name: "tiny".into(),
    };
    let unloaded = node.client.call(&unload, DEADLINE).await.unwrap();
    assert_eq!(unloaded.n_requests_ended, 1);
    let error = loop {
        match stream.next(DEADLINE).await {
            Ok(Some(Event::Item(_))) => {}
            Err(ClientError::Answered(error)) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(error.code(), Code::ModelStopping);
    let again = node
        .client
        .call(&unload, DEADLINE)
        .await
        .expect_err("it is gone");
    assert!(matches!(again, ClientError::Answered(error) if error.code() == Code::ModelNotFound));
    assert!(node.catalog.entries().keys().eq(["bad"]));
}

#[tokio::test]
async fn a_loader_that_breaks_off_leaves_a_failed_entry() {
    let node = Node::start(vec![model("tiny", &QUICK)]).await;
    std::fs::write(node.folder.path().join("models/bug.gguf"), b"weights").unwrap();
    assert_eq!(node.load("bug").await.1.unwrap_err().code(), Code::Internal);
    assert_eq!(node.catalog.entries()["bug"].state(), "failed");
    node.generate(&request(Input::Prompt("hi".into()), Some(2)))
        .await
        .unwrap();
}

#[tokio::test]
async fn damage_is_a_finding_and_a_good_model_has_none() {
    let node = Node::start(vec![]).await;
    let store = node.folder.path().join("models");
    std::fs::write(store.join("good.gguf"), writer::tiny_llama_gguf().bytes()).unwrap();
    std::fs::write(
        store.join("cut.gguf"),
        &writer::tiny_llama_gguf().bytes()[..200],
    )
    .unwrap();
    for (name, n_findings) in [("good", 0), ("cut", 1)] {
        let request = ModelVerifyRequest {
            name: name.to_owned(),
        };
        let mut stream = node.client.stream(&request, DEADLINE).await.unwrap();
        let report = loop {
            match stream.next(DEADLINE).await.unwrap() {
                Some(Event::Item(progress)) => assert!(progress.done <= progress.total),
                Some(Event::Reply(report)) => break report,
                None => panic!("the stream has no reply"),
            }
        };
        assert_eq!(report.findings.len(), n_findings, "{report:?}");
        assert_eq!(report.n_files, u32::from(n_findings == 0));
    }
}

#[tokio::test]
async fn an_operator_adds_changes_and_removes_tenants() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tenants.toml");
    std::fs::write(&path, "version = 1\n[[tenants]]\nname = \"a\"\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let tenants = Tenants::read(Source::File(path), Now::read()).unwrap();
    let node = Node::start_with(tenants, vec![model("tiny", &QUICK)]).await;
    let patch = TenantPatch {
        weight: Some(3),
        class: Some(TenantClass::Batch),
        concurrency: CapChange::To(8),
        requests_per_minute: CapChange::Keep,
        tokens_per_minute: CapChange::To(1000),
        models: ModelsChange::To(vec!["tiny".into()]),
    };
    let add = TenantAddRequest {
        name: "b".into(),
        patch: patch.clone(),
    };
    let added = node.client.call(&add, DEADLINE).await.unwrap();
    assert!(added.key.starts_with("sk-"), "{added:?}");
    let set = TenantSetRequest {
        name: "b".into(),
        patch: TenantPatch {
            weight: None,
            class: None,
            concurrency: CapChange::Clear,
            models: ModelsChange::All,
            ..patch
        },
    };
    let shown = node.client.call(&set, DEADLINE).await.unwrap();
    assert_eq!((shown.entry.weight, shown.entry.n_keys), (3, 1));
    assert_eq!(shown.entry.class, TenantClass::Batch);
    assert_eq!((shown.models, shown.concurrency.max), (None, None));
    let tokens = &shown.tokens_per_minute;
    assert_eq!((tokens.max, tokens.left), (Some(1000), Some(1000)));
    let refusal = |outcome: Result<(), ClientError>| match outcome {
        Err(ClientError::Answered(error)) => (error.code(), error.message),
        other => panic!("{other:?}"),
    };
    let again = node.client.call(&add, DEADLINE).await.map(|_| ());
    assert_eq!(refusal(again).0, Code::InvalidRequest);
    let rotate = |grace_s| TenantRotateKeyRequest {
        name: "b".into(),
        grace_s,
    };
    let rotated = node.client.call(&rotate(60), DEADLINE).await.unwrap();
    assert_ne!(rotated.key, added.key);
    let forever = node.client.call(&rotate(u64::MAX), DEADLINE).await;
    assert_eq!(refusal(forever.map(|_| ())).0, Code::InvalidRequest);
    let list = node.client.call(&TenantListRequest {}, DEADLINE).await;
    let names: Vec<_> = list.unwrap().tenants.into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["a", "b"]);
    let remove = TenantRemoveRequest { name: "b".into() };
    node.client.call(&remove, DEADLINE).await.unwrap();
    let gone = node.client.call(&remove, DEADLINE).await.map(|_| ());
    assert_eq!(
        refusal(gone),
        (Code::NotFound, "no tenant is called `b`".to_owned())
    );
    let show = TenantShowRequest { name: "b".into() };
    let gone = node.client.call(&show, DEADLINE).await.map(|_| ());
    assert_eq!(refusal(gone).0, Code::NotFound);
}
