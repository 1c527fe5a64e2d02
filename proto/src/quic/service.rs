//! What a node answers: one method per call, and the way replies of a stream take.
//!
//! A method's future is dropped when the caller goes away, so cancelling needs no code beyond
//! letting go of what the future holds.

use std::{marker::PhantomData, time::Duration};

use quinn::SendStream;
use tokio::time::timeout;

use crate::{
    code::Code,
    ids::Epoch,
    wire::{
        Message,
        admin::{
            ErrorReply, ModelListReply, ModelListRequest, ModelLoadReply, ModelLoadRequest,
            ModelUnloadReply, ModelUnloadRequest, ModelVerifyReply, ModelVerifyRequest, Progress,
            StatusReply, StatusRequest, TenantAddRequest, TenantKeyReply, TenantListReply,
            TenantListRequest, TenantRemoveReply, TenantRemoveRequest, TenantRotateKeyRequest,
            TenantSetRequest, TenantShowReply, TenantShowRequest,
        },
        frame,
        generate::{GenerateDelta, GenerateDone, GenerateRequest},
    },
};

/// A request with the reply that ends its call.
pub trait Call: Message {
    /// The last frame, unless it is an [`ErrorReply`].
    type Reply: Message;
}

/// A call with frames before its reply.
pub trait StreamCall: Call {
    /// What comes before the reply.
    type Item: Message;
}

impl Call for StatusRequest {
    type Reply = StatusReply;
}

impl Call for ModelListRequest {
    type Reply = ModelListReply;
}

impl Call for ModelUnloadRequest {
    type Reply = ModelUnloadReply;
}

impl Call for ModelLoadRequest {
    type Reply = ModelLoadReply;
}

impl StreamCall for ModelLoadRequest {
    type Item = Progress;
}

impl Call for ModelVerifyRequest {
    type Reply = ModelVerifyReply;
}

impl StreamCall for ModelVerifyRequest {
    type Item = Progress;
}

impl Call for TenantListRequest {
    type Reply = TenantListReply;
}

impl Call for TenantShowRequest {
    type Reply = TenantShowReply;
}

impl Call for TenantAddRequest {
    type Reply = TenantKeyReply;
}

impl Call for TenantSetRequest {
    type Reply = TenantShowReply;
}

impl Call for TenantRotateKeyRequest {
    type Reply = TenantKeyReply;
}

impl Call for TenantRemoveRequest {
    type Reply = TenantRemoveReply;
}

impl Call for GenerateRequest {
    type Reply = GenerateDone;
}

impl StreamCall for GenerateRequest {
    type Item = GenerateDelta;
}

/// The calls of a node. Each runs as a task of the server; its future is dropped when the caller
/// stops listening, the connection is lost or the server's drain time is over; work that must not
/// stop half-way belongs to a task of the node, which the future only waits for.
pub trait AdminService: Send + Sync + 'static {
    /// The node as it is now.
    fn status(&self) -> impl Future<Output = Result<StatusReply, ErrorReply>> + Send;

    /// Models loaded and models that could be.
    fn model_list(&self) -> impl Future<Output = Result<ModelListReply, ErrorReply>> + Send;

    /// Loads a model and reports how far it is.
    fn model_load(
        &self,
        request: ModelLoadRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> impl Future<Output = Result<ModelLoadReply, ErrorReply>> + Send;

    /// Unloads a model.
    fn model_unload(
        &self,
        request: ModelUnloadRequest,
    ) -> impl Future<Output = Result<ModelUnloadReply, ErrorReply>> + Send;

    /// Checks a model's files and reports how far it is. Damage is a finding, not an error.
    fn model_verify(
        &self,
        request: ModelVerifyRequest,
        progress: &mut ReplySender<'_, Progress>,
    ) -> impl Future<Output = Result<ModelVerifyReply, ErrorReply>> + Send;

    /// The tenants.
    fn tenant_list(&self) -> impl Future<Output = Result<TenantListReply, ErrorReply>> + Send;

    /// One tenant, and what it used.
    fn tenant_show(
        &self,
        request: TenantShowRequest,
    ) -> impl Future<Output = Result<TenantShowReply, ErrorReply>> + Send;

    /// Adds a tenant and tells its key.
    fn tenant_add(
        &self,
        request: TenantAddRequest,
    ) -> impl Future<Output = Result<TenantKeyReply, ErrorReply>> + Send;

    /// Changes a tenant's settings.
    fn tenant_set(
        &self,
        request: TenantSetRequest,
    ) -> impl Future<Output = Result<TenantShowReply, ErrorReply>> + Send;

    /// Gives a tenant a new key.
    fn tenant_rotate_key(
        &self,
        request: TenantRotateKeyRequest,
    ) -> impl Future<Output = Result<TenantKeyReply, ErrorReply>> + Send;

    /// Removes a tenant.
    fn tenant_remove(
        &self,
        request: TenantRemoveRequest,
    ) -> impl Future<Output = Result<TenantRemoveReply, ErrorReply>> + Send;

    /// Generates and sends text as it comes.
    fn generate(
        &self,
        request: GenerateRequest,
        deltas: &mut ReplySender<'_, GenerateDelta>,
    ) -> impl Future<Output = Result<GenerateDone, ErrorReply>> + Send;
}

/// The caller does not listen any more; the future that learns it may as well return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the caller is gone")]
pub struct Gone;

impl From<Gone> for ErrorReply {
    fn from(gone: Gone) -> Self {
        Self::new(Code::ClientGone, gone.to_string())
    }
}

/// Sends the frames before a reply. Holds nothing back: a send returns once the bytes are in the
/// window of the stream, and waits while the caller reads slowly.
#[derive(Debug)]
pub struct ReplySender<'s, M> {
    stream: &'s mut SendStream,
    write_timeout: Duration,
    message: PhantomData<fn(M)>,
}

impl<'s, M: Message> ReplySender<'s, M> {
    pub(super) fn new(stream: &'s mut SendStream, write_timeout: Duration) -> Self {
        Self {
            stream,
            write_timeout,
            message: PhantomData,
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// [`Gone`] when the caller stopped listening, did not read for the server's write timeout, or
    /// the message exceeds its class.
    pub async fn send(&mut self, message: &M) -> Result<(), Gone> {
        let bytes = frame::encode(message, Epoch::default()).map_err(|error| {
            tracing::error!(message = M::NAME, %error, "cannot encode a reply");
            Gone
        })?;
        match timeout(self.write_timeout, self.stream.write_all(&bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }
}
